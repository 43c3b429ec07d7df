"""Reads an adapter_config.json with the LoraConfig of one PEFT; run as a script.

Old versions do not import beside a new transformers, but their configurations do.

    python old_peft.py DIRECTORY_OF_PEFT ADAPTER
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType


def main(root: str, adapter: str) -> None:
    """Prints the fields that were read, as JSON."""
    packages = {}
    for name in ("peft", "peft.utils", "peft.tuners", "peft.tuners.lora"):
        packages[name] = sys.modules[name] = ModuleType(name)
        packages[name].__path__ = [str(Path(root, *name.split(".")))]
    types = importlib.import_module("peft.utils.peft_types")
    vars(packages["peft.utils"]).update(vars(types))
    vars(packages["peft.utils"])["CONFIG_NAME"] = "adapter_config.json"
    lora = importlib.import_module("peft.tuners.lora.config").LoraConfig
    mapping = sys.modules["peft.mapping"] = ModuleType("peft.mapping")
    for module in (mapping, packages["peft"]):
        vars(module)["PEFT_TYPE_TO_CONFIG_MAPPING"] = {"LORA": lora}
    config = lora.from_pretrained(adapter)
    print(json.dumps({"r": config.r, "target_modules": sorted(config.target_modules)}))


if __name__ == "__main__":
    main(*sys.argv[1:])

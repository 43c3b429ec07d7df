"""How a loaded adapter is described."""

import json

from convert.peft import TRAINING_RECORD
from qlora_jax.inference.identity import describe_adapter


def test_an_adapter_is_described_with_the_step_that_its_record_has(tmp_path):
    assert describe_adapter(tmp_path) == f"adapter `{tmp_path}`"
    (tmp_path / TRAINING_RECORD).write_text(json.dumps({"step": 1200}))
    assert describe_adapter(tmp_path) == f"adapter `{tmp_path}` (step 1,200)"

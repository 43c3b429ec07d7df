"""What is said of an adapter that was loaded."""

import json

from qlora_jax.provenance import adapter_in_words


def test_the_step_of_an_adapter_is_said_where_a_run_says_it(tmp_path):
    run = tmp_path / "run"
    for name in ("adapter", "best_adapter"):
        (run / name).mkdir(parents=True)
        (run / name / "adapter_config.json").write_text("{}")
    (run / "best_adapter" / "best.json").write_text('{"step": 1200}')
    newest, best = run / "adapter", run / "best_adapter"
    # Without its settings this is no run.
    assert adapter_in_words(best) == f"adapter `{best}`"
    (run / "config.toml").write_text("")
    assert adapter_in_words(best) == f"adapter `{best}` (step 1,200)"
    assert adapter_in_words(newest) == f"adapter `{newest}`"
    (run / "report.json").write_text(json.dumps({"steps": 2000}))
    assert adapter_in_words(newest) == f"adapter `{newest}` (step 2,000)"
    # A run that is trained on has checkpoints, and its report may be of before.
    for name in ("step_9", "step_3000", "damaged_step_4000", "step_x"):
        (run / "checkpoints" / name).mkdir(parents=True)
    assert adapter_in_words(newest) == f"adapter `{newest}` (step 3,000)"

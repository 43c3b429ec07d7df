import pytest

from qlora_jax.errors import CheckpointError, UserError


@pytest.mark.parametrize("error", [UserError, CheckpointError])
def test_what_a_user_can_mend_is_a_value_error(error):
    with pytest.raises(ValueError, match="the reason"):
        raise error("the reason")


def test_a_damaged_file_is_caught_with_the_other_user_errors():
    with pytest.raises(UserError, match="`model.safetensors`"):
        raise CheckpointError("`model.safetensors` ends early")

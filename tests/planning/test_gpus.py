import dataclasses

import pytest

from qlora_jax.errors import UserError
from qlora_jax.planning.gpus import CARDS, GpuSpec, find_gpu


def test_every_listed_gpu_is_found_however_it_is_spelled():
    for name, gpu in CARDS.items():
        assert find_gpu(name) is gpu
        assert find_gpu(name.upper().replace("-", "_")) is gpu
        assert gpu.compiles


def test_data_sheet_numbers_keep_their_units():
    gpu = find_gpu("rtx-4090")
    assert gpu.memory_bytes == 24 * 10**9
    assert gpu.bandwidth == 1.008e12
    assert gpu.flops == 165e12
    assert gpu.l2_bytes == 72 * 2**20


def test_only_gpus_before_8_0_lack_bfloat16():
    assert {name for name, gpu in CARDS.items() if not gpu.bfloat16} == {"t4"}


def test_the_target_says_what_the_gpu_is():
    text = find_gpu("h200").target
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in text
    assert "core_count: 132" in text
    assert "device_memory_size: 141000000000" in text
    assert 'device_description_str: "NVIDIA H200"' in text
    # Without them XLA makes no command buffers of products and slices.
    for name in ("driver", "runtime", "compile_time_toolkit"):
        assert f'{name}_version: "13.0.0"' in text
    assert "feature_extension" not in find_gpu("rtx-3090").target


def test_an_unknown_gpu_is_refused_with_the_nearest_and_the_list():
    with pytest.raises(UserError, match="Did you mean `rtx-4090`.*GPUs: b200, h200"):
        find_gpu("rtx4090")
    with pytest.raises(UserError, match="No GPU `abacus` is known. GPUs: b200"):
        find_gpu("abacus")


def test_a_file_like_a_gpu_changes_what_it_says(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text('like = "h200"\nmemory_gb = 12\ncompute_capability = "8.9"\n')
    gpu = find_gpu(str(path))
    expected = dataclasses.replace(
        CARDS["h200"], name="small", memory_bytes=12 * 10**9, compute_capability=(8, 9)
    )
    assert gpu == expected


def test_a_file_may_describe_a_gpu_in_full(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "Mine"\ncompute_capability = "12.0"\nmemory_gb = 32\n'
        "multiprocessors = 170\nclock_ghz = 2.4\nbandwidth_gb_s = 1792\n"
        "tflops = 209.5\nhost_link_gb_s = 64\nl2_mib = 96\n"
    )
    assert find_gpu(str(path)) == GpuSpec(
        "Mine", 32 * 10**9, (12, 0), 170, 2.4, 1.792e12, 209.5e12, 64e9, 96 << 20
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('like = "h300"', "`like` must be one of .*h200.*, got 'h300'"),
        ('like = "h200"\nmemory_gb = -1', "`memory_gb` must be a positive number"),
        ('like = "h200"\nmemory_gb = nan', "`memory_gb` must be a positive number"),
        (
            'like = "h200"\nmemory = 3',
            "`memory` is not a field.*Did you mean `memory_gb`",
        ),
        ('like = "h200"\ncompute_capability = "9"', "must be like '8.9', got '9'"),
        ("memory_gb = 8", "missing `compute_capability`, `multiprocessors`"),
        ("memory_gb =", "is not valid TOML"),
    ],
)
def test_a_file_that_does_not_describe_a_gpu_is_refused(tmp_path, content, message):
    path = tmp_path / "card.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        find_gpu(str(path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.toml` cannot be read"):
        find_gpu(str(tmp_path / "nowhere.toml"))


def test_a_capability_without_known_limits_cannot_be_compiled_for(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text('like = "t4"\ncompute_capability = "6.1"\n')
    gpu = find_gpu(str(path))
    assert not gpu.compiles
    with pytest.raises(UserError, match="old: compute capability 6.1 is not known"):
        gpu.target  # noqa: B018


@pytest.mark.parametrize(
    ("short", "name"),
    [("a100", "a100-80"), ("4090", "rtx-4090"), ("A100_40", "a100-40")],
)
def test_short_names_of_gpus(short, name):
    assert find_gpu(short) is find_gpu(name)

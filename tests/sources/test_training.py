"""Folders of trainers: told apart from a model, with the command that makes one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightlab.errors import MalformedFileError, UnsupportedFormatError
from weightlab.sources import open_source


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as opened:
            torch.save({"w": torch.zeros(2)}, opened)
    return folder


ZERO = "global_step100/zero_pp_rank_0_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("files", "given", "says", "command"),
    [
        ([ZERO, "zero_to_fp32.py", "latest"], "", "DeepSpeed", "python {}/zero_to_fp32.py {} OUT"),
        ([ZERO, "zero_to_fp32.py"], "global_step100", "DeepSpeed", "python {}/zero_to_fp32.py {} OUT"),
        ([ZERO], "", "DeepSpeed", "python -m deepspeed.utils.zero_to_fp32 {} OUT"),
        (["global_step9/mp_rank_00_model_states.pt"], "", "DeepSpeed", "deepspeed.utils.zero_to_fp32 {} OUT"),
        (["x.ckpt/checkpoint/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], "x.ckpt", "DeepSpeed", "zero_to_fp32"),
        (["__0_0.distcp", ".metadata"], "", "distributed", "format_utils dcp_to_torch {} OUT.pt"),
        (
            ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp"],
            "",
            "distributed",
            "accelerate merge-weights {}/pytorch_model_fsdp_0 OUT",
        ),
        (
            ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"],
            "",
            "verl",
            "verl.model_merger merge --backend fsdp --local_dir {} ",
        ),
        (["checkpoint/step-1000/__0_0.distcp"], "", "distributed", "dcp_to_torch {}/checkpoint/step-1000 OUT.pt"),
        (["model_world_size_1_rank_0.pt"], "", "verl", "verl.model_merger"),
        (
            ["global_step_20/actor/model_world_size_1_rank_0.pt", "global_step_100/actor/model_world_size_1_rank_0.pt"],
            "",
            "verl",
            "--local_dir {}/global_step_100/actor",
        ),
        (["iter_0000010/mp_rank_00/model_optim_rng.pt"], "", "Megatron", "tools/checkpoint/convert.py"),
        (["iter_0000010/__0_0.distcp", "latest_checkpointed_iteration.txt"], "", "Megatron", "convert.py"),
        (["consolidated.00.pth", "consolidated.01.pth"], "", "Llama", "convert_llama_weights_to_hf"),
        (
            ["checkpoint-90/pytorch_model.bin", "checkpoint-100/pytorch_model.bin", "training_args.bin"],
            "",
            "trainer's output",
            "the newest is {}/checkpoint-100",
        ),
        (
            ["checkpoints/epoch=1-step=9.ckpt", "checkpoints/epoch=2-step=18.ckpt"],
            "",
            "trainer's output",
            "the newest is {}/checkpoints/epoch=2-step=18.ckpt",
        ),
        (
            [f"lightning_logs/version_{n}/checkpoints/epoch=0-step={n}.ckpt" for n in (2, 10)],
            "",
            "trainer's output",
            "the newest is {}/lightning_logs/version_10/checkpoints/epoch=0-step=10.ckpt",
        ),
    ],
)  # fmt: skip
def test_what_it_is_and_what_to_do(tmp_path: Path, files: list[str], given: str, says: str, command: str) -> None:
    fill(tmp_path, *files)
    with pytest.raises(UnsupportedFormatError, match=says) as failed:
        open_source(tmp_path / given)
    assert failed.value.exit_code == 3
    assert command.format(tmp_path, tmp_path) in failed.value.remedy


def test_a_whole_model_beside_is_the_model(tmp_path: Path) -> None:
    fill(tmp_path, ZERO, "zero_to_fp32.py", "checkpoint-10/pytorch_model.bin", "optimizer.bin", "scaler.pt")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert set(open_source(tmp_path).specs) == {"w"}
    (tmp_path / "model.safetensors").unlink()
    fill(tmp_path, "pytorch_model.bin")
    assert set(open_source(tmp_path).specs) == {"w"}


STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "optimizer.bin",
          "scaler.pt", "random_states_0.pkl", "optimizer_1.bin", "lr_scheduler.pt", "sampler.bin")  # fmt: skip


@pytest.mark.parametrize("own", ["checkpoint.pt", "weights.ckpt", "ema.pth"])
def test_the_one_file_that_is_no_trainers_state(tmp_path: Path, own: str) -> None:
    fill(tmp_path, *STATES, own)
    source = open_source(tmp_path)
    assert set(source.specs) == {"w"} and getattr(source, "files", None) == {own}
    fill(tmp_path, "other.pt")
    with pytest.raises(MalformedFileError, match="2 files could be the model") as failed:
        open_source(tmp_path)
    assert failed.value.offenders == tuple(sorted([own, "other.pt"]))


def test_links_are_not_followed_to_find_out(tmp_path: Path) -> None:
    fill(tmp_path / "outside", "mp_rank_00_model_states.pt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/global_step1").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsupportedFormatError, match="trainer's output"):
        open_source(tmp_path / "model")

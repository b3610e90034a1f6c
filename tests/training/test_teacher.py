"""What the original says, from the disk and from memory: the same, within the room that is said."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from tiny_models import VOCABULARY, tokens

from compresso.calibration.opening import open_adapter
from compresso.errors import ResourceError
from compresso.runtime import Runtime
from compresso.training import disk_teacher, lessons, processes, teacher
from compresso.training.lessons import Wanted
from compresso.training.model import TrainingModel
from compresso.training.objectives import MixedObjective, Shares
from compresso.training.teacher import Beside, DiskTeacher, ResidentTeacher, open_teacher

SEQUENCES = tokens(5, 16, seed=9)
ROWS = torch.tensor([4, 0, 3])
WIDTH = 64
LOGITS = 3 * torch.randn(3, 16, VOCABULARY, generator=torch.Generator().manual_seed(2))
WHOLE = Wanted(hidden=True, blocks=(0, 4), scores=True, temperature=2.0)
NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


def runtime(dtype=torch.float32, memory=10**9):
    return Runtime(torch.device("cpu"), dtype, memory, trust_remote_code=False)


def disk(source, directory, wanted=WHOLE, sequences=SEQUENCES, **options):
    where = runtime(**options)
    adapter = open_adapter(source, where)
    return DiskTeacher(adapter, source, sequences, wanted, directory=directory, runtime=where)


def resident(source, wanted=WHOLE):
    return ResidentTeacher(open_adapter(source, runtime()), source, wanted)


def asked(found, part=slice(2, 7)):
    """Everything in a lesson."""
    lesson = found.lesson(SEQUENCES[ROWS], ROWS)
    return {
        "hidden": lesson.hidden,
        **{f"block {block}": states for block, states in lesson.blocks.items()},
        "divergence": lesson.divergence(LOGITS[:, part], part),
    }


def close(found, expected, tolerance):
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = (found[name].float() - value).abs().max() / value.abs().max()
        assert error < tolerance, name


def test_the_disk_says_what_memory_says(checkpoints, family_name, tmp_path, monkeypatch):
    """To the rounding of bfloat16, in which states are kept; in batches of two and of one."""
    monkeypatch.setattr(disk_teacher, "TOKENS_PER_BATCH", 32)
    source = checkpoints(family_name)
    with resident(source) as memory, disk(source, tmp_path) as stored:
        close(asked(stored), asked(memory), 2**-7)
        [directory] = tmp_path.iterdir()
        sizes = [file.stat().st_size for file in directory.iterdir()]
        assert sum(sizes) == stored.nbytes == 3 * 5 * 16 * WIDTH * 2


def test_states_that_go_to_the_disk_meanwhile_change_nothing(checkpoints, tmp_path):
    source = checkpoints("llama")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    with disk(source, tmp_path / "a") as one, disk(source, tmp_path / "b", memory=0) as other:
        for name, value in asked(one).items():
            assert torch.equal(value, asked(other)[name]), name


@pytest.mark.parametrize("piece", [1, 10**9])
def test_top_scores_from_the_disk(checkpoints, tmp_path, monkeypatch, piece):
    """A lower bound that comes near; all other tokens count as one."""
    monkeypatch.setattr(disk_teacher, "LOGITS_BYTES", piece)
    source = checkpoints("llama")
    with resident(source, Wanted(scores=True)) as memory:
        expected = asked(memory)["divergence"]
    last = torch.zeros_like(expected)
    for count in (4, 32, VOCABULARY + 5):
        wanted = Wanted(scores=True, top=count)
        with disk(source, tmp_path, wanted) as stored:
            count = min(count, VOCABULARY - 1)
            assert stored.nbytes == 5 * 16 * (4 * count + 2 * (count + 1))
            lesson = stored.lesson(SEQUENCES[ROWS], ROWS)
            assert lesson.hidden is None
            found = lesson.divergence(LOGITS[:, 2:7], slice(2, 7))
        assert bool((found < expected + 1e-2).all()) and bool((found > last - 1e-2).all())
        last = found
    assert (last - expected).abs().max() < 1e-2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_memory_and_disk_keep_as_many_of_the_likely_tokens(checkpoints, tmp_path, temperature):
    """To the rounding of float16: where the original is, is not to change what is trained."""
    source = checkpoints("llama")
    for count in (1, 4, VOCABULARY + 5):
        wanted = Wanted(scores=True, top=count, temperature=temperature)
        with resident(source, wanted) as memory, disk(source, tmp_path, wanted) as stored:
            found, expected = (
                one.lesson(SEQUENCES[ROWS], ROWS).divergence(LOGITS[:, 2:7], slice(2, 7))
                for one in (memory, stored)
            )
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)
    with resident(source, Wanted(scores=True, temperature=temperature)) as memory:
        whole = asked(memory)["divergence"]
    with resident(source, Wanted(scores=True, top=1, temperature=temperature)) as memory:
        assert (asked(memory)["divergence"] < whole).all()


@pytest.mark.parametrize("top", [None, 4])
def test_a_model_learns_nothing_from_itself(checkpoints, tmp_path, top):
    """States are kept in bfloat16, scores in float16: what is left is their rounding."""
    source = checkpoints("llama")
    wanted = Wanted(scores=True, top=top)
    with disk(source, tmp_path, wanted) as stored:
        model = TrainingModel(open_adapter(source, runtime()), source)
        with model, torch.no_grad():
            parts = MixedObjective(Shares(divergence=1.0), stored)(model, SEQUENCES[ROWS], ROWS)
    assert 0 <= abs(float(parts["divergence"])) < 1e-5


def test_what_was_asked_is_kept_for_a_later_run(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    with disk(source, tmp_path) as first:
        before = asked(first)

    def never(*_, **__):
        raise AssertionError("the original was run again")

    monkeypatch.setattr(DiskTeacher, "_ask", never)
    again = disk(source, tmp_path)
    assert again.complete
    with again:
        for name, value in asked(again).items():
            assert torch.equal(value, before[name])
    others = [
        disk(source, tmp_path, Wanted(hidden=True)),
        disk(source, tmp_path, sequences=SEQUENCES.flip(0)),
        disk(source, tmp_path, dtype=torch.bfloat16),
        disk(checkpoints("mistral"), tmp_path),
    ]
    assert not any(other.complete for other in others)


def kill(teacher, monkeypatch):
    """Break it off while it asks the original."""

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(DiskTeacher, "_ask", killed)
        with pytest.raises(KeyboardInterrupt):
            teacher.__enter__()


def test_what_a_killed_run_had_begun_is_begun_anew(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    kill(disk(source, tmp_path), monkeypatch)
    assert not disk(source, tmp_path).complete
    with resident(source) as memory, disk(source, tmp_path) as stored:
        close(asked(stored), asked(memory), 2**-7)
    assert len(list(tmp_path.iterdir())) == 1


def test_states_are_kept_in_the_original_s_own_type(checkpoints, models, tmp_path):
    import copy

    from compresso.checkpoint.reader import Checkpoint

    copy.deepcopy(models("llama")).half().save_pretrained(tmp_path / "half")
    with disk(Checkpoint(tmp_path / "half"), tmp_path) as stored:
        assert stored.lesson(SEQUENCES[ROWS], ROWS).hidden.dtype == torch.float16


def opened(source, directory, place, wanted=WHOLE):
    return open_teacher(
        source, SEQUENCES, wanted, place=place, directory=directory, runtime=runtime()
    )


def test_the_disk_is_taken_where_it_has_room(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    assert isinstance(opened(source, tmp_path / "new", "auto"), DiskTeacher)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        opened(source, tmp_path / "file" / "new", "auto")
    assert isinstance(opened(source, tmp_path, "disk"), DiskTeacher)
    assert isinstance(opened(source, tmp_path, "resident"), ResidentTeacher)
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: full)
    assert isinstance(opened(source, tmp_path, "auto"), ResidentTeacher)
    with pytest.raises(ResourceError, match=r"takes 30\.7 kB, but .* has 1 kB free") as caught:
        opened(source, tmp_path, "disk")
    assert "resident" in caught.value.hint
    monkeypatch.setattr(processes, "free_memory", lambda: 10)
    with pytest.raises(ResourceError, match=r"of memory, or 30\.7 kB of disk, but 10 B are free"):
        opened(source, tmp_path, "auto")
    with pytest.raises(ResourceError, match=r"the original takes .* of memory, but 10 B are free"):
        opened(source, tmp_path, "resident")


def test_a_run_that_goes_on_takes_the_same_place(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    with monkeypatch.context() as full:
        full.setattr(teacher.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        assert opened(source, tmp_path, "auto").place == "resident"
    assert opened(source, tmp_path, "auto").place == "resident"
    assert opened(source, tmp_path / "another", "auto").place == "disk"


def test_what_a_killed_run_had_begun_takes_no_room(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    kill(opened(source, tmp_path, "disk"), monkeypatch)
    [begun] = tmp_path.iterdir()

    def free(path):  # as much as it takes, once
        return type("Usage", (), {"free": 40_000 * (not begun.exists())})()

    monkeypatch.setattr(teacher.shutil, "disk_usage", free)
    assert opened(source, tmp_path, "disk").place == "disk" and not begun.exists()


def test_what_else_has_to_fit_is_counted(checkpoints, tmp_path, monkeypatch):
    source = checkpoints("llama")
    original = int(teacher.SPARE * source.parameters * 4)

    def placed(place, beside):
        return open_teacher(
            *(source, SEQUENCES, WHOLE),
            place=place,
            directory=tmp_path,
            runtime=runtime(),
            beside=beside,
        ).place

    monkeypatch.setattr(processes, "free_memory", lambda: original + 1000)
    assert placed("resident", Beside(memory=1000)) == "resident"
    with pytest.raises(ResourceError, match=r"of memory, and training 1 kB more, but"):
        placed("resident", Beside(memory=1001))
    monkeypatch.setattr(
        teacher.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 31_720})()
    )
    assert placed("disk", Beside(disk=1000)) == "disk"
    with pytest.raises(ResourceError, match=r"30\.7 kB, and training 1 kB, but .* has 31\.7 kB"):
        placed("disk", Beside(disk=1001))
    for name, value in {"MASTER_ADDR": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match="of memory, but"):  # each has it, of half the memory
        placed("resident", Beside())


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_disk_that_is_full_is_said(checkpoints, tmp_path, monkeypatch, call):
    def refuses(*_):
        raise NO_ROOM

    monkeypatch.setattr(lessons.os, call, refuses)
    with pytest.raises(ResourceError, match="No space left on device"):
        disk(checkpoints("llama"), tmp_path).__enter__()
    assert not disk(checkpoints("llama"), tmp_path).complete
    assert os.listdir(tmp_path) == [] or call == "fsync"

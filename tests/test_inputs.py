"""Which checkpoints are meant, and in which order."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from streaming_polyak import average_checkpoints
from streaming_polyak.errors import CheckpointError
from streaming_polyak.files.formats import open_checkpoint
from streaming_polyak.files.formats.hdf5 import Parser
from streaming_polyak.files.inputs import check_no_averages, find_checkpoints, find_inputs, natural


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder "run" in the current one, with three members whose numbers have one and two digits."""
    monkeypatch.chdir(tmp_path)
    touch("run/epoch-9.keras", "run/epoch-10.keras", "run/epoch-8.keras")
    return Path("run")


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def names(given, **options):
    return [path.name for path in find_checkpoints(given, **options)]


IN_ORDER = ["epoch-8.keras", "epoch-9.keras", "epoch-10.keras"]


def test_paths_stay_in_the_order_in_which_they_are_given():
    given = ["b-1.keras", Path("a-3.npz"), "a-2.h5"]
    assert find_checkpoints(given) == [Path("b-1.keras"), Path("a-3.npz"), Path("a-2.h5")]
    assert find_checkpoints(path for path in given) == find_checkpoints(given)


@pytest.mark.parametrize("given", ["a.keras", Path("a.keras"), ("a.keras",)])
def test_one_path_need_not_stand_in_a_list(given):
    assert find_checkpoints(given) == [Path("a.keras")]


def test_a_pattern_stands_for_what_it_matches_in_the_order_of_the_numbers(folder):
    assert names("run/*.keras") == IN_ORDER
    assert names("run/epoch-[89].keras") == IN_ORDER[:2]
    assert names("run/epoch-?.keras") == IN_ORDER[:2]
    assert names(["run/epoch-10.keras", "run/epoch-?.keras"]) == ["epoch-10.keras", "epoch-8.keras", "epoch-9.keras"]


def test_a_pattern_that_matches_nothing_is_an_error(folder):
    with pytest.raises(CheckpointError, match=r"run/\*\.npz: no file matches this pattern") as refused:
        find_checkpoints("run/*.npz")
    assert refused.value.code == "missing"


def test_a_name_that_looks_like_a_pattern_is_itself_if_it_is_there(folder):
    touch("run/epoch-[8].keras", "odd[1]/a.keras")
    assert names("run/epoch-[8].keras") == ["epoch-[8].keras"]
    assert find_checkpoints("odd[1]") == [Path("odd[1]/a.keras")]


def test_a_folder_stands_for_the_checkpoints_in_it(folder):
    touch("run/notes.txt", "run/.writing-0123-epoch-11.keras", "run/.hidden.keras")
    assert names(folder) == names("run") == IN_ORDER
    touch("run/deeper/epoch-1.keras")
    assert names("run") == IN_ORDER


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint \(\.keras, .*\) is in this folder") as refused:
        find_checkpoints(tmp_path)
    assert refused.value.code == "empty-list"


def test_of_a_sharded_store_a_folder_gives_the_map_only(folder):
    touch("sharded/m-1.weights.json", "sharded/m-1_00000.weights.h5", "sharded/m-1_00001.weights.h5")
    touch("sharded/m-0.weights.json", "sharded/m-0_00000.weights.h5")
    assert names("sharded") == ["m-0.weights.json", "m-1.weights.json"]
    touch("plain/m_00000.weights.h5", "plain/m_00001.weights.h5")  # no map: files of their own
    assert names("plain") == ["m_00000.weights.h5", "m_00001.weights.h5"]


def test_a_folder_with_several_kinds_of_checkpoints_is_an_error_that_says_how_to_choose(folder):
    touch("run/epoch-10.weights.h5")
    message = r"several kinds in it \(\.keras, \.weights\.h5\)\. Say which with a pattern, such as 'run/\*\.keras'"
    with pytest.raises(CheckpointError, match=message) as refused:
        find_checkpoints("run")
    assert refused.value.code == "mixed-folder"


def test_saved_models_are_folders_that_stand_for_themselves(folder):
    touch("models/2/saved_model.pb", "models/10/saved_model.pb", "models/2/variables/variables.index")
    assert find_checkpoints("models/2") == [Path("models/2")]
    assert names("models") == ["2", "10"]


def test_a_list_file_names_one_a_line(folder):
    Path("list.txt").write_text("# oldest first\nrun/epoch-10.keras\n\n  run/epoch-8.keras  \nrun/epoch-?.keras\n")
    assert names("@list.txt") == ["epoch-10.keras", "epoch-8.keras", "epoch-8.keras", "epoch-9.keras"]
    assert names(["a.keras", "@list.txt"])[:2] == ["a.keras", "epoch-10.keras"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: .*No such file"), (b"\xff\n", "cannot be read"), (b"@list.txt\n", "another list")],
    ids=["missing", "not UTF-8", "nested"],
)
def test_a_list_that_cannot_be_read_or_names_a_list_is_an_error(folder, content, message):
    if content is not None:
        Path("list.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"list\.txt: .*{message}") as refused:
        find_checkpoints("@list.txt")
    assert refused.value.code == "list"


@pytest.mark.parametrize("given", [[], (), "@list.txt"])
def test_no_checkpoint_at_all_is_an_error(folder, given):
    Path("list.txt").write_text("# nothing yet\n")
    with pytest.raises(CheckpointError, match="expected at least one checkpoint to average, got none") as refused:
        find_checkpoints(given)
    assert refused.value.code == "empty-list"


def test_sorting_by_epoch_orders_all_by_the_last_number_in_the_name():
    given = ["b/run2-epoch-10.weights.h5", "a/run2-epoch-9.weights.h5", "c/run1-epoch-0011.weights.h5"]
    ordered = ["run2-epoch-9.weights.h5", "run2-epoch-10.weights.h5", "run1-epoch-0011.weights.h5"]
    assert names(given, sort="epoch") == ordered  # neither the 5 of .h5 nor the folders count


def test_the_digits_of_a_score_are_no_epoch():
    given = ["weights.10-0.21.keras", "weights.09-0.25.keras", "weights.11-0.19.keras"]  # as Keras' ModelCheckpoint
    assert names(given, sort="epoch") == ["weights.09-0.25.keras", "weights.10-0.21.keras", "weights.11-0.19.keras"]
    given = ["epoch_3_fold1.keras", "Epoch2_fold1.keras"]
    assert names(given, sort="epoch") == ["Epoch2_fold1.keras", "epoch_3_fold1.keras"]


@pytest.mark.parametrize(
    "ordered",
    [
        ["ep1_val12.keras", "ep2_val11.keras", "ep10_val3.keras"],
        ["deep7-ep_2.h5", "deep1-ep_3.h5"],
        ["epoch2-step9.npz", "epoch3-step1.npz"],
        ["step_9-seed2.npz", "step_10-seed1.npz"],
        ["v2.ckpt-900.index", "v1.ckpt-1000.index"],
        ["v1_iter900.npz", "v1_iter1000.npz"],
        ["a-2.npz", "epoch-3.npz", "b-10.npz"],  # one number each
        ["run3_fold1_9_0.31.keras", "run3_fold1_10_0.25.keras", "run3_fold1_11_0.20.keras"],  # one that differs
        ["run3_9.keras"],
    ],
)
def test_the_epoch_is_behind_its_word_or_the_only_number_or_the_only_one_that_differs(ordered):
    assert names(ordered[::-1], sort="epoch") == ordered


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (["fold1_12.keras", "fold2_11.keras"], "1, 12"),
        (["a_1_12.keras", "b_1_11.keras"], "1, 12"),
        (["ckpt1_step2.keras", "ckpt2_step1.keras"], "1, 2"),
        (["epoch3_fold1.keras", "fold2.keras", "fold5_7.keras"], "3, 1"),
        (["epoch3_epoch5.keras", "epoch4_epoch4.keras"], "3, 5"),
    ],
)
def test_which_of_several_numbers_is_the_epoch_is_not_guessed(given, numbers):
    message = rf"{given[0]}: its name has several numbers \({numbers}\), .* Name the files in their order instead"
    with pytest.raises(CheckpointError, match=message) as refused:
        find_checkpoints(given, sort="epoch")
    assert refused.value.code == "sort"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a.keras", "b-1.keras"], r"a\.keras: its name has no number to sort by"),
        (["final.weights.h5"], r"final\.weights\.h5: its name has no number to sort by"),
        (["x-7.keras", "y-07.keras"], r"y-07\.keras: its name has the number 7, as x-7\.keras has"),
    ],
)
def test_sorting_by_epoch_needs_a_number_of_its_own_in_each_name(given, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        find_checkpoints(given, sort="epoch")
    assert refused.value.code == "sort"


def test_only_the_known_orders_are_taken():
    with pytest.raises(ValueError, match="Expected sort=\"epoch\" or None, got sort='name'"):
        find_checkpoints("a.keras", sort="name")


def test_last_takes_the_newest_after_ordering(folder):
    assert names("run", last=2) == IN_ORDER[1:]
    assert names("run", last=3) == IN_ORDER
    assert names(["run/epoch-10.keras", "run/epoch-8.keras"], last=1) == ["epoch-8.keras"]
    assert names(["run/epoch-10.keras", "run/epoch-8.keras"], last=1, sort="epoch") == ["epoch-10.keras"]


def test_fewer_checkpoints_than_the_last_ones_asked_for_are_an_error(folder):
    with pytest.raises(CheckpointError, match="the last 4 checkpoints are asked for, but there are only 3") as refused:
        find_checkpoints("run", last=4)
    assert refused.value.code == "too-few"
    with pytest.raises(ValueError, match="Expected last >= 1, got last=0"):
        find_checkpoints("run", last=0)


def test_numbers_in_names_are_ordered_as_numbers_whatever_stands_around_them():
    ordered = ["2a.npz", "10a.npz", "a2b1.npz", "a2b10.npz", "a10b.npz", "a.npz", "b.npz"]
    assert sorted(map(Path, ordered[::-1]), key=natural) == list(map(Path, ordered))
    assert natural(Path("1²2")) == ((0, 1), (1, "²"), (0, 2))  # a digit, but no number


def test_what_a_folder_or_a_pattern_took_in_is_told_from_what_was_named(folder):
    Path("list.txt").write_text("run/epoch-9.keras\nrun/epoch-1?.keras\n")
    touch("model/saved_model.pb", "other/a.npz")
    found = find_inputs(["@list.txt", "run/epoch-8.keras", "other", "model"])
    assert found.paths == find_checkpoints(["@list.txt", "run/epoch-8.keras", "other", "model"])
    assert found.taken_in == {Path("run/epoch-10.keras"), Path("other/a.npz")}
    assert find_inputs(["run", "a.keras"], last=2).taken_in == {Path("run/epoch-10.keras")}


def test_an_average_made_into_the_folder_of_its_inputs_is_no_input_unless_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    for number in (1, 2):
        save_file({"w": np.full(3, number, np.float32)}, f"run/{number}.safetensors")
    average_checkpoints("run/[12].safetensors", "run/average.safetensors")

    def check(*given):
        found = find_inputs(given)
        with Parser() as parser:
            tables = [open_checkpoint(path, parser) for path in found.paths]
        for table in tables:
            table.close()
        check_no_averages(found, [table.provenance is not None for table in tables])

    for given in ("run", "run/*.safetensors"):
        with pytest.raises(CheckpointError, match=r"run/average\.safetensors: it is an average .* Name the") as refused:
            check(given)
        assert refused.value.code == "average-among-inputs"
    check("run/[12].safetensors", "run/average.safetensors")

"""What holds for any input: files read back as written, constants are read or refused, the shuffle loses no row."""
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lib.batches
from cycles.sealed import read_sealed, write_sealed
from lib.batches import Rows, shuffled_batches
from lib.constants import override
from lib.environment import InputError
from lib.files import read_json, read_torch, write_json, write_torch
from lib.outputs import differences, is_current, safe_name

QUICK = settings(max_examples=60, deadline=None)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(), lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8])


@st.composite
def tensors(draw):
    found = {}
    for name in draw(st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=1, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        found[name] = torch.randint(0, 100, shape,
                                    generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))).to(draw(DTYPES))
    return found


@QUICK
@given(st.dictionaries(st.text().filter(lambda name: name != "sha256"), JSON,
                       max_size=5).filter(lambda d: "sha256:" not in str(d)), st.booleans())
def test_json_comes_back_as_it_was_written(value, sealed):
    with TemporaryDirectory() as folder:
        write_json(Path(folder) / "x.json", value, sealed)
        assert read_json(Path(folder) / "x.json") == value
        assert [path.name for path in Path(folder).iterdir()] == ["x.json"]


@QUICK
@given(tensors())
def test_tensors_come_back_as_they_were_written(value):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write_sealed(path, value)
        first = path.read_bytes()
        found = [read_sealed(path)]
        write_sealed(path, dict(reversed(value.items())))
        assert path.read_bytes() == first  # equal values give equal bytes
        write_torch(path, value)
        found.append(read_torch(path, ""))
        for read in found:
            assert read.keys() == value.keys()
            assert all(torch.equal(read[name], value[name]) and read[name].dtype == value[name].dtype for name in value)


@QUICK
@given(st.text())
def test_no_name_leaves_its_folder(name):
    folder = Path("/store/runs")
    try:
        path = (folder / safe_name(name)).resolve()
    except InputError:
        return
    assert path.parent == folder and path.name == name


@QUICK
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_differences_are_empty_only_for_what_is_equal(then, now):
    assert not differences(then, then)
    merged = {name: now.get(name, value) for name, value in then.items()}
    if merged != then and not any(isinstance(value, dict) for value in then.values()):
        assert differences(then, merged)


def test_an_output_tells_what_it_was_made_from():
    then = {"constants": {"TOP_K": 4, "SEED": 0}, "activations": "0" * 16}
    assert differences(then, {"constants": {"TOP_K": 8, "SEED": 0}, "activations": "1" * 16}) == "TOP_K was 4, is 8"
    assert differences(then, then | {"activations": "1" * 16}) == "other activations"
    assert not is_current("x.pt", None, then, "")
    assert is_current("x.pt", then | {"more": 1}, then, "") and is_current("x.pt", {"k": [1, 2]}, {"k": (1, 2)}, "")
    with pytest.raises(InputError, match="x.pt was made with other constants or data .SEED was 0, is 1.; delete it"):
        is_current("x.pt", then, {"constants": {"TOP_K": 4, "SEED": 1}}, "delete it")


SOURCE = 'COUNT = 3\nRATE = 0.5\nNAME = "a"\nFLAG = False\nLIMIT: int | None = None\nPAIR = (1, 2)\n'


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SOURCE)
    return path


def constants(path, *arguments):
    names = {"__name__": "__main__", "__file__": str(path)}
    exec(compile(SOURCE, str(path), "exec"), names)
    return override(names, argv=list(arguments))


@QUICK
@given(count=st.integers(), rate=st.floats(allow_nan=False, allow_infinity=False),
       name=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), flag=st.booleans(),
       limit=st.none() | st.integers(), pair=st.tuples(st.integers(), NUMBERS))
def test_constants_are_read_as_python_writes_them(script, count, rate, name, flag, limit, pair):
    given = {"COUNT": count, "RATE": rate, "FLAG": flag, "LIMIT": limit, "PAIR": pair}
    assert (constants(script, *(f"{key}={value!r}" for key, value in given.items()), f"NAME={name}") == given
            | {"NAME": name})


@QUICK
@given(st.text())
def test_any_argument_is_taken_or_refused_with_one_line(script, argument):
    """What can't be a constant ends with exit code 0 (help) or 2, never another."""
    try:
        found = constants(script, argument)
    except SystemExit as ended:
        assert ended.code in (0, 2)
    else:
        assert argument.partition("=")[0] in found


@QUICK
@example([1, 1, 1], 0.0, 4, 0, 0, 1)  # fewer rows than a batch, in several buffers
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 0.8), st.integers(1, 30), st.integers(0, 5),
       st.integers(0, 3), st.sampled_from([1, 200, 10_000]))
def test_the_shuffle_is_a_permutation_that_comes_again(sizes, val_share, batch_size, seed, epoch, buffer_bytes):
    n = sum(sizes)
    is_val = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < val_share
    is_val[0] = False
    number = torch.arange(float(n))[:, None]
    rows = Rows(list(number.split(sizes)), is_val, torch.zeros(1), torch.eye(1))
    usual, lib.batches.BUFFER_BYTES = lib.batches.BUFFER_BYTES, buffer_bytes
    try:
        batches, again = ([batch[:, 0].long() for batch in shuffled_batches(rows, torch.eye(1), batch_size, seed=seed,
                                                                            epoch=epoch)] for _ in range(2))
    finally:
        lib.batches.BUFFER_BYTES = usual
    # so a resumed epoch goes on at any batch
    assert len(batches) == len(again) and all(map(torch.equal, batches, again))
    seen = torch.cat(batches)
    assert len(seen.unique()) == len(seen) and not is_val[seen].any()
    n_train = int((~is_val).sum())
    assert (len(seen) == (n_train // batch_size * batch_size or n_train)
            and len(batches) == max(1, n_train // batch_size))

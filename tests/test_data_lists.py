from pathlib import Path

import pytest
from PIL import Image

from pseudoseg_fast.data.lists import DataError, Index, Sample, read_classes, read_list
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.tags import read_tags


@pytest.fixture
def root(tmp_path):
    for name in ("images/a.jpg", "images/b 2.jpg", "images/deep/c.PNG", "masks/a.png", "masks/b 2.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3)).save(path)
    return tmp_path / "data"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_labeled_list_with_every_kind_of_line(root):
    text = "\ufeff# image mask\r\n\r\n./images/a.jpg   masks/a.png \r\nimages/b 2.jpg\tmasks/b 2.png\n"
    samples = read_list(write(root / "splits" / "train.txt", text), root)
    assert [sample.name for sample in samples] == ["images/a.jpg", "images/b 2.jpg"]
    assert [sample.mask for sample in samples] == [root / "masks/a.png", root / "masks/b 2.png"]
    assert samples[1].image == root / "images/b 2.jpg"


def test_list_is_found_from_the_working_directory_before_the_root(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(root / "list.txt", "images/deep/c.PNG\n")
    assert read_unlabeled("list.txt", "data")[0].image == root / "images/deep/c.PNG"
    write(tmp_path / "list.txt", "images/a.jpg\n")
    assert read_unlabeled("list.txt", "data")[0].name == "images/a.jpg"


def test_unlabeled_list_ignores_its_mask_column(root):
    path = write(root / "list.txt", "images/a.jpg masks/nowhere.png\nimages/b 2.jpg\t\n")
    samples = read_unlabeled(path, root)
    assert [(sample.name, sample.mask) for sample in samples] == [
        ("images/a.jpg", None),
        ("images/b 2.jpg", None),
    ]


NAMES = ("images/photo.jpg", "images/photo (1).jpg", "images/photo.jpg copy.jpg", "images/a.jpg 2.jpg")


@pytest.mark.parametrize(
    "line", [*NAMES[1:], "photo (1)", "images/photo (1)", "/images/photo (1).jpg", "b 2"]
)
def test_a_space_may_be_part_of_a_name(root, line):
    """Even where its first word alone means another picture, of which another mask is known."""
    for name in NAMES:
        Image.new("L", (4, 3)).save(root / name)
    found = [
        Sample(name, root / name, root / f"masks/{Path(name).stem}.png")
        for name in (*NAMES, "images/b 2.jpg")
    ]
    expected = next(sample for sample in found if line.strip("/") in sample.name)
    expected.mask.touch()
    path = write(root / "list.txt", f"{line}\n")
    assert read_list(path, root, index=Index(found)) == [expected]
    assert read_unlabeled(path, root, Index(found))[0] == expected._replace(mask=None)


@pytest.fixture
def index(root):
    return Index([Sample("images/a.jpg", root / "images/a.jpg", root / "masks/a.png")])


@pytest.mark.parametrize(
    "line",
    [
        "images/a (3).jpg",
        "a (3)",
        "a copy",
        "a copy 2",
        "a 2 copy.jpg",
        "images/a.jpg copy 2.jpg",
        "a b 2.jpg",
    ],
)
def test_a_line_that_is_no_picture_is_not_read_as_another(root, index, line):
    path = write(root / "list.txt", f"{line}\n")
    for masks in ("required", "optional", "ignored"):
        with pytest.raises(DataError) as error:
            read_list(path, root, masks, index)
        assert "a tab between the two where names have spaces" in str(error.value)
        assert "or names that the layout knows:" in str(error.value)
        assert "--data.layout" not in str(error.value)
        assert f"line 1: {root / line}" in str(error.value)
        with pytest.raises(DataError, match=r"bare ids need a --data.layout"):
            read_list(path, root, masks)


@pytest.mark.parametrize(
    "line",
    [
        "a 1",
        "a  -1",
        "a +0.5",
        "a 1 0 -1",
        "a a",
        "a a.png",
        "a masks/a.png",
        "a nowhere/a.png",
        "images/a masks/a",
        "/images/a /nowhere/a",
        "/images/a.jpg /nowhere/a.png",
        "images/a.jpg 3",
        "images/a.jpg -",
        "images/a.jpg (3)",
        "images/a.jpg x.mat",
        "images/a.jpg masks/a",
        "images/a.jpg masks/a.npy",
        "images/a.jpg nowhere/a.png",
        "images/a.jpg masks/a.png 1",
    ],
)
def test_further_columns_need_no_tab(root, index, line):
    """Lists that others publish: ids and flags, or masks of a folder that is not there, which the layout replaces."""
    path = write(root / "list.txt", f"{line}\n")
    assert read_list(path, root, index=index) == index.samples
    assert read_list(path, root, "optional", index) == index.samples
    assert read_unlabeled(path, root, index)[0] == index.samples[0]._replace(mask=None)


def test_a_second_column_that_no_layout_replaces(root):
    path = write(root / "list.txt", "images/a.jpg 3\n")
    with pytest.raises(DataError, match=rf"missing files in .*: 1;.*\n  line 1: {root / '3'}$"):
        read_list(path, root)
    assert read_unlabeled(path, root)[0].name == "images/a.jpg"


def test_an_id_of_several_pictures_is_refused(root):
    found = [Sample(f"{name}/a.jpg", root / name / "a.jpg") for name in ("x", "y")]
    for line in ("a", "a 1", "a a"):
        with pytest.raises(DataError, match=r"line 1: a may be x/a.jpg, y/a.jpg; expected more of its path"):
            read_list(write(root / "list.txt", f"{line}\n"), root, "ignored", Index(found))


def test_whole_paths_need_no_index(root):
    """Which takes long and much memory to make, where a layout has found millions."""

    def never():
        raise AssertionError("looked up")
        yield

    path = write(root / "list.txt", "images/a.jpg masks/a.png\n")
    assert read_list(path, root, index=Index(never()))[0].mask == root / "masks/a.png"


def test_unlabeled_folder_is_read_in_depth_and_sorted(root):
    write(root / "images" / ".hidden.jpg", "")
    write(root / "images" / "notes.txt", "")
    names = [sample.name for sample in read_unlabeled("images", root)]
    assert names == ["images/a.jpg", "images/b 2.jpg", "images/deep/c.PNG"]
    outside = [sample.name for sample in read_unlabeled(root / "images", root / "masks")]
    assert outside == ["a.jpg", "b 2.jpg", "deep/c.PNG"]


def test_all_missing_files_come_in_one_error(root):
    rows = [f"images/{number}.jpg masks/a.png" for number in range(12)]
    path = write(root / "list.txt", "\n".join(["images/a.jpg masks/a.png", *rows]))
    with pytest.raises(DataError, match=r"missing files in .*: 12;") as error:
        read_list(path, root)
    assert f"line 2: {root / 'images/0.jpg'}" in str(error.value)
    assert "9.jpg" in str(error.value)
    assert "10.jpg" not in str(error.value)
    assert "and 2 more" in str(error.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param("# nothing\n\n", "is empty", id="empty"),
        pytest.param(
            "images/a.jpg\n", r"line 1: expected 'image mask', got only 'images/a.jpg'", id="no-mask"
        ),
        pytest.param(
            "images/b 2.jpg masks/b 2.png\n", r"missing files in .*: 1; .* a tab between the two", id="spaces"
        ),
        pytest.param("images/a.jpg\tmasks/a.png\tx\n", "line 1: .* got 3 columns", id="columns"),
        pytest.param("images/a.jpg ../other/a.png\n", r"line 1: ../other/a.png leaves the root", id="leaves"),
        pytest.param("/etc/passwd masks/a.png\n", "leaves the root", id="absolute"),
        pytest.param(
            "/images/none.jpg masks/a.png\n", r"missing files in .*: 1;", id="missing, with a slash"
        ),
    ],
)
def test_wrong_labeled_list(root, text, match):
    with pytest.raises(DataError, match=match):
        read_list(write(root / "list.txt", text), root)


def test_missing_list_names_both_places(root):
    with pytest.raises(DataError) as error:
        read_list("splits/none.txt", root)
    assert str(Path.cwd() / "splits/none.txt") in str(error.value)
    assert str(root / "splits/none.txt") in str(error.value)


def test_folder_without_pictures(root):
    (root / "bare").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        read_unlabeled("bare", root)


def test_classes(root):
    assert read_classes(write(root / "classes.txt", "sky\r\ntraffic light\r\n\r\n"), root) == [
        "sky",
        "traffic light",
    ]
    with pytest.raises(DataError, match="names a class twice: sky"):
        read_classes(write(root / "twice.txt", "sky\nroad\nsky\n"))
    with pytest.raises(DataError, match="names 256 classes"):
        read_classes(write(root / "many.txt", "\n".join(map(str, range(256)))))


def test_tags(root):
    classes = ["background", "skin", "hair"]
    path = write(root / "tags.csv", "image,tags\nimages/a.jpg,skin; hair\nimages/c.jpg,\n")
    assert read_tags(path, classes) == {"images/a.jpg": (1, 2), "images/c.jpg": ()}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param(
            "image,tags\na.jpg,skin;hiar\n", "line 2: 'hiar' is not a class; did you mean 'hair'", id="typo"
        ),
        pytest.param("image,labels\na.jpg,skin\n", "has no column tags", id="header"),
        pytest.param(
            "image,tags\na.jpg,skin,hair\n",
            "line 2: expected the 2 columns of the header, got 3",
            id="commas",
        ),
        pytest.param("image,tags\na.jpg,skin\na.jpg,hair\n", "line 3: a.jpg has tags already", id="twice"),
        pytest.param("image,tags\n", "is empty", id="empty"),
    ],
)
def test_wrong_tags(root, text, match):
    with pytest.raises(DataError, match=match):
        read_tags(write(root / "tags.csv", text), ["skin", "hair"])

import pytest
import torch

# What only some tests need is imported where it is used: kernels are also tested without Pillow and onnx.


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def labels_model(tmp_path_factory):
    from deployed import make_model

    return make_model(tmp_path_factory.mktemp("model") / "labels.onnx")


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures and a folder with one of the same name and another size."""
    import tiny
    from PIL import Image

    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.jpg", "more/a.png")):
        image = Image.fromarray(tiny.picture(index)[0])
        image.crop((0, 0, 48 - index // 2, 40)).save(folder / name, quality=95)
    return folder

"""Models: the sizes of the paper, trained weights that classify as published, starting weights, checkpoints."""

import pytest
import torch
from torch import nn

import dzhpc
from dzhpc import config, data
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files.checkpoint import State, save_checkpoint
from dzhpc.models import zoo
from dzhpc.models.cnn import SimpleCNN
from dzhpc.models.identity import model_sha256, tensors_sha256
from dzhpc.models.resnet import resnet18, resnet20, resnet56


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "parameters"), [(1, 730), (2, 3_700), (3, 6_670), (4, 9_640), (5, 12_610)])
def test_the_simple_cnn_has_the_papers_parameters(depth, parameters):
    model = SimpleCNN(depth)
    assert size(model) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("make", "parameters"), [(resnet20, 269_722), (resnet18, 11_173_962), (resnet56, 853_018)])
def test_resnets_have_their_known_parameters(make, parameters):
    model = make()
    assert size(model) == parameters
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(("count", "expected"), [(500, 455), pytest.param(10_000, 9173, marks=pytest.mark.long)])
@torch.no_grad()
def test_trained_resnet20_weights_classify_91_73_percent_of_the_test_images(data_root, cifar10, count, expected):
    path = data_root / "weights" / "cifar10-resnet20.th"
    if not path.exists():
        pytest.skip(f"trained weights: {path} does not exist; set DZHPC_DATA")
    model = zoo.build(config.Model(name="resnet20", weights=str(path)), seed=0).eval().to(memory_format=torch.channels_last)
    normalised = data.DataSet(
        cifar10.train, cifar10.test, torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]), cifar10.classes
    )
    correct = 0
    for images, labels in zip(cifar10.test.images[:count].split(500), cifar10.test.labels[:count].split(500), strict=True):
        inputs = normalised.normalise(images).contiguous(memory_format=torch.channels_last)
        correct += int((model(inputs).argmax(1) == labels).sum())
    assert correct == expected


def test_the_option_a_shortcut_subsamples_and_pads_channels_on_both_sides():
    x = torch.randn(2, 16, 6, 6)
    out = resnet20().layer2[0].shortcut(x)
    assert out.shape == (2, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() + out[:, 24:].abs().sum() == 0


def test_weights_are_a_function_of_the_seed_and_leave_the_global_random_numbers_alone():
    section = config.Model(name="cnn", depth=2)
    before = torch.get_rng_state()
    a, b, c = (zoo.build(section, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (config.Model(name="cnn", dpeth=2), r"unknown key model\.dpeth; model cnn takes classes, depth, in_channels, width"),
        (config.Model(name="resnet99"), r'model\.name = "resnet99": expected cnn \| cnn8'),
        (config.Model(name="cnn", depth=0), r"model\.depth = 0.*expected at least 1"),
        (config.Model(name="cnn", depth="two"), r"\[model\] cnn: "),
        (
            config.Model(name="torch.nn:Linear", in_features=-1, out_features=2),
            r"\[model\] torch.nn:Linear: RuntimeError: .*negative",
        ),
        (config.Model(name="torch.nn:Relu"), "module torch.nn has no 'Relu'"),
        (config.Model(name="pathlib:Path"), "gave a PosixPath, expected a torch.nn.Module"),
        (config.Model(name="collections:OrderedDict"), 'model.name = "collections:OrderedDict"'),
        (config.Model(name="math:pi"), 'model.name = "math:pi"'),
        (config.Model(name="torch.nn:Linear", in_features=3), r"\[model\] torch.nn:Linear: .*out_features"),
    ],
)
def test_a_model_section_that_builds_nothing_is_refused(section, message):
    with pytest.raises(InputError, match=message):
        zoo.build(section, 0)


def test_a_class_of_the_users_is_built_with_its_own_arguments():
    model = zoo.build(config.Model(name="torch.nn:Linear", in_features=3, out_features=2), 0)
    assert model.weight.shape == (2, 3)


def checkpoint_of(model, toml, path, lpr=None):
    state = State(
        config=toml,
        history=[],
        step=3,
        epoch=0.5,
        queries=7,
        wall_time_s=1.0,
        run_uuid="u",
        model_sha256=model_sha256(model),
        seed=0,
        params=dict(model.named_parameters()),
        buffers=dict(model.named_buffers()),
        optimizer={},
        coordinates=torch.arange(3).numpy(),
        lpr=lpr,
    )
    save_checkpoint(path, state)


def trained(seed=5):
    model = SimpleCNN(2, 4)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.copy_(torch.rand(t.shape) * 9)
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_starting_weights_come_from_a_torch_state_dict(tmp_path, wrapped):
    model, path = trained(), tmp_path / "w.pt"
    state = model.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if wrapped else state, path)
    found = zoo.build(config.Model(name="cnn", depth=2, width=4, weights=str(path)), 0).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def wrappings(state):
    """What other codes save."""
    named = lambda prefix: {f"{prefix}{k}": v for k, v in state.items()}  # noqa: E731
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    return {
        "compiled": named("_orig_mod."),
        "compiled in parallel": {"model": named("_orig_mod.module."), "epoch": 3},
        "parallel compiled": {"net": named("module._orig_mod.")},
        "lightning": {"state_dict": {**named("model."), "loss.weight": torch.ones(3)}, "optimizer_states": [{"step": 1}]},
        "compiled inside": {"model_state_dict": {k.replace("layer1.", "layer1._orig_mod."): v for k, v in named("net.").items()}},
        "deep": {"checkpoint": {"model": {"state_dict": named("backbone.")}}},
        "teacher": {"state_dict": {**{f"teacher.{k}": v.reshape(-1)[:0] for k, v in state.items()}, **named("student.")}},
        "ema beside": {"ema": other, "state_dict": state},
        "ema alone": {"model": None, "ema_state_dict": named("module.")},
        "without counters": {k: v for k, v in state.items() if "num_batches" not in k},
        "parameters": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()},
        "half": {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    }


@pytest.mark.parametrize("name", wrappings({}))
def test_starting_weights_are_found_where_other_codes_put_them(tmp_path, name):
    state, path = {k: torch.randint(1, 9, v.shape).to(v) for k, v in resnet20().state_dict().items()}, tmp_path / "w.pt"
    torch.save(wrappings(state)[name], path)
    found = zoo.build(config.Model(name="resnet20", weights=str(path)), 0).state_dict()
    assert all(torch.equal(found[k], v) for k, v in state.items() if name != "without counters" or "num_batches" not in k)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "is a web page; download the weights themselves"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:",
            "is a pointer of git-lfs; get the file itself with `git lfs",
        ),
        ((2**7).to_bytes(8, "little") + b'{"a":{"dtype":"F32"', "is a safetensors file; write torch.save"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file that dzhpc did not write"),
        (b"not weights", "is no file of torch.save, or is cut short"),
        (nn.ReLU(), "holds Python objects (torch.nn.modules.activation.ReLU), not only tensors; save model.state_dict() instead"),
        ([1, 2], "does not fit SimpleCNN: holds no tensors by name"),
        (
            {"state_dict": {f"module.{k}": v for k, v in SimpleCNN(2, 5).state_dict().items()}},
            "does not fit SimpleCNN: holds 16 tensors below state_dict (module.features.0.weight, module.features.0.bias, "
            "...), the model wants 16 (features.0.weight, features.0.bias, ...); features.0.weight is [5, 3, 3, 3], in "
            "the model [4, 3, 3, 3]",
        ),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'", "is a file of NumPy's; write torch.save"),
        (b"PK\x03\x04" + bytes(26) + b"features.0.weight.npy", "is a file of NumPy's; write torch.save"),
        *(
            (
                {key: change(value) for key, value in SimpleCNN(2, 4).state_dict().items()},
                f"features.0.weight is {said}; save plain",
            )
            for change, said in (
                (lambda t: t + 0j, "complex"),
                (lambda t: t.to("meta"), "on the device meta, without numbers"),
                (lambda t: t.to_sparse() if t.ndim == 4 else t, "sparse"),
            )
        ),
        ({"a.weight": torch.ones(2)}, "the file has no features.0.weight (14 in all); the model has no a.weight (1 in all)"),
    ],
)
def test_a_file_that_is_no_weights_of_the_model_says_what_it_holds(tmp_path, content, message):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError) as refusal:
        zoo.build(config.Model(name="cnn", depth=2, width=4, weights=str(path)), 0)
    assert message in str(refusal.value)
    assert "weights_only" not in str(refusal.value)


def test_a_torchvision_network_is_built_by_its_name_with_its_own_keys():
    section = config.Model(name="torchvision.models:resnet18", num_classes=7)
    zoo.fill_in(section, classes=7, in_channels=3)
    assert section.fields == {"num_classes": 7}
    assert zoo.build(section, 0).fc.out_features == 7


def test_only_what_a_constructor_names_is_filled_in():
    section = config.Model(name="cnn")
    zoo.fill_in(section, classes=7, in_channels=1, dims=2)
    assert section.fields == {"classes": 7, "in_channels": 1}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "torch.nn:LazyLinear", "out_features": 3}, "weight has no shape yet"),
        ({"name": "torch.nn:LazyBatchNorm1d", "affine": False}, "running_mean has no shape yet"),
        ({"name": "nets:sixteen_bits", "dtype": "bfloat16"}, "weight is bfloat16; expected float32 or float64"),
        ({"name": "nets:sixteen_bits", "dtype": "float16"}, "weight is float16; expected float32 or float64"),
    ],
)
def test_parameters_without_a_shape_or_of_16_bits_are_refused(keys, message):
    with pytest.raises(InputError, match=f"model {keys['name']}: {message}"):
        zoo.build(config.Model(**keys), 0)


def test_starting_weights_come_from_a_checkpoint_of_ours(tmp_path):
    model, path = trained(), tmp_path / "step-00000003.h5"
    checkpoint_of(model, "", path)
    found = zoo.build(config.Model(name="cnn", depth=2, width=4, weights=str(path)), 0).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def broken_weights(folder):
    torch.save(SimpleCNN(3, 4).state_dict(), folder / "other depth")
    torch.save(SimpleCNN(2, 5).state_dict(), folder / "other width")
    torch.save([1, 2], folder / "a list")
    torch.save({"state_dict": [1, 2]}, folder / "a list inside")
    torch.save({"fc.weight": "text"}, folder / "text")
    torch.save({1: torch.zeros(2)}, folder / "numbered")
    torch.save(nn.ReLU(), folder / "a whole module")
    checkpoint_of(SimpleCNN(2, 5), "", folder / "another checkpoint")
    (folder / "a page").write_text("<html></html>")
    (folder / "an input file").write_text("[run]\nname = 'x'\n")
    (folder / "nothing").write_bytes(b"")
    (folder / "a cut archive").write_bytes((folder / "other depth").read_bytes()[:3000])
    (folder / "a cut checkpoint").write_bytes((folder / "another checkpoint").read_bytes()[:3000])
    (folder / "zeros").write_bytes(bytes(100))
    (folder / "a folder").mkdir()


WRONG_WEIGHTS = (
    "absent", "other depth", "other width", "a list", "a list inside", "text", "numbered", "a whole module",
    "another checkpoint", "a page", "an input file", "nothing", "a cut archive", "a cut checkpoint", "zeros", "a folder",
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused_with_the_files_name(tmp_path, name):
    broken_weights(tmp_path)
    with pytest.raises(InputError, match=rf"model\.weights.*{tmp_path / name}"):
        zoo.build(config.Model(name="cnn", depth=2, width=4, weights=str(tmp_path / name)), 0)


def test_load_model_gives_the_trained_network_back_in_eval_mode(tmp_path):
    model = trained()
    toml = config.load(None, ["model.name=cnn", "model.depth=2", "model.width=4", "model.weights=gone.pt"]).to_toml()
    checkpoint_of(model, toml, tmp_path / "c.h5")
    found = dzhpc.load_model(tmp_path / "c.h5")
    assert (type(found), found.training) == (SimpleCNN, False)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in model.state_dict().items())


def test_load_model_refuses_a_checkpoint_without_a_network_of_another_model_or_damaged(tmp_path):
    objective = config.load(None, ["task.kind=objective", "task.function=a:B", "sparsity.scores=random"]).to_toml()
    other = config.load(None, ["model.name=cnn", "model.depth=3", "model.width=4"]).to_toml()
    for toml, message in ((objective, "task.kind = objective has no network"), (other, "of another model")):
        checkpoint_of(trained(), toml, tmp_path / "c.h5")
        with pytest.raises(CheckpointError, match=message):
            dzhpc.load_model(tmp_path / "c.h5")
    (tmp_path / "c.h5").write_bytes((tmp_path / "c.h5").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        dzhpc.load_model(tmp_path / "c.h5")
    with pytest.raises(CheckpointError, match=r"absent\.h5: cannot be read"):
        dzhpc.load_model(tmp_path / "absent.h5")


def test_the_identity_of_a_model_is_names_shapes_and_dtypes_and_not_values():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert model_sha256(a) == model_sha256(b)
    others = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2).double(), torch.nn.Sequential(a)]
    assert len({model_sha256(m) for m in [a, *others]}) == 5
    contents = [tensors_sha256(dict(m.named_parameters()), content=True) for m in (a, b, a)]
    assert contents[0] == contents[2] != contents[1]

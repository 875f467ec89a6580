"""The defence: gradients of (A2) by queries, noise, engines, boxes that give numpy, evaluation, first-order parts, loading."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dzhpc
from dzhpc import config, data
from dzhpc.certify import parser
from dzhpc.engines import make_engine
from dzhpc.engines.blackbox import BlackBox
from dzhpc.errors import CheckpointError, InputError, NumericalError
from dzhpc.files import runfolder
from dzhpc.files.checkpoint import State
from dzhpc.job.world import World
from dzhpc.method.first_order import PARTS
from dzhpc.models import zoo
from dzhpc.models.dncnn import DnCNN
from dzhpc.models.frozen import Frozen
from dzhpc.models.identity import fingerprint, model_sha256
from dzhpc.models.resnet import resnet20
from dzhpc.tasks import make_task
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.defense.certification import Certification, classifier_of
from dzhpc.tasks.defense.classifier import Answers, ClassifierLoss, load_network
from dzhpc.tasks.defense.inference import Defense, evaluation_noise, load_defense

MODULE = '''
import numpy as np
import torch
from torch import nn

torch.manual_seed(5)
NET = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4))
SEEN = []


def classify(images):
    """numpy in, numpy out, detached: nothing could be differentiated."""
    SEEN.append(images)
    return NET(torch.from_numpy(images)).detach().numpy()


def softly(images):
    return torch.softmax(NET(torch.from_numpy(images)), 1).detach().numpy().round(2)


def of_three(images):
    return np.zeros((len(images), 3))


class Flat(nn.Conv2d):
    """Calls view, which channels-last features refuse."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(x).view(x.shape[0], -1).view(x.shape)


def column(images):
    return classify(images)[:, :1]


def flat(images):
    return classify(images)[:, 0]


def excluding(images):
    return np.where([True, True, False, True], classify(images), -np.inf)


def nowhere(images):
    return np.full((len(images), 4), -np.inf)


def unbounded(images):
    return np.where([True, True, False, True], classify(images), np.inf)


def images():
    draw = np.random.default_rng(0)
    sets = [(draw.integers(0, 256, (n, 3, 8, 8), np.uint8), np.arange(n) % 4) for n in (40, 20)]
    return sets


class Net(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.features = NET[:2]
        self.fc = nn.Linear(96, classes)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))
'''


@pytest.fixture(scope="module", autouse=True)
def user(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "own_defense.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import own_defense

        torch.save(own_defense.Net().state_dict(), folder / "net.th")
        yield own_defense


KEYS = ("task.kind=defense", "data.name=own_defense:images", "data.batch_size=10", "data.augment=false", "model.name=dncnn")
SMALL = (*KEYS, "model.depth=3", "model.width=5", "sparsity.ratio=0.0", "zo.mu=1e-4", "eval.batch_size=6")
FUNCTION = (*SMALL, "task.classifier=own_defense:classify")


def task_of(*overrides, keys=FUNCTION):
    return make_task(config.load(None, [*keys, *overrides]), torch.device("cpu"))


def white(user, *overrides):
    folder = user.__file__.replace("own_defense.py", "net.th")
    keys = (f"task.classifier={folder}", "task.classifier_model=own_defense:Net", *overrides)
    return task_of(*keys, keys=SMALL)


def randomise(model):
    """Every weight away from zero, the last convolution's too."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn_like(p))


@pytest.mark.parametrize("kind", ["full", "reuse", "delta"])
def test_the_query_gradient_is_that_of_a_white_box_copy(user, kind):
    model = DnCNN(4, 6).double()
    randomise(model)
    net = user.NET.double()
    answers, box = Answers(), BlackBox(lambda images: net(torch.from_numpy(images)).detach().numpy(), 7, numpy=True)
    clean = torch.rand(6, 3, 8, 8).double()
    targets = answers.probabilities(box(clean))
    engine = make_engine(kind, model, ClassifierLoss(box, answers))
    noisy = clean + 0.25 * torch.randn_like(clean)
    engine.bind(noisy, targets)
    coords = np.random.default_rng(1).permutation(engine.index.size)[:200]
    estimate = dzhpc.cge(engine, coords, 1e-4)
    copy = ClassifierLoss(box, answers, net)
    exact = torch.autograd.grad(copy(model(noisy), targets), engine.index.parameters)
    exact = engine.index.flatten(exact)[torch.from_numpy(coords)]
    user.NET.float()
    assert torch.cosine_similarity(estimate, exact, dim=0) > 0.999
    assert torch.linalg.vector_norm(estimate) / torch.linalg.vector_norm(exact) == pytest.approx(1, abs=0.02)


def test_the_query_gradient_with_trained_weights(data_root, cifar10):
    """ReLUs of the classifier switch within mu, so mu is smaller than above; it matters for the shipped input, too."""
    files = [data_root / "weights" / name for name in ("dncnn-color-blind.pth", "cifar10-resnet20.th")]
    if not all(file.exists() for file in files):
        pytest.skip(f"trained weights: {files} do not exist; set DZHPC_DATA")
    section = config.Model(name="dncnn", weights=str(files[0]), trainable=["model.38.weight"])
    model = zoo.build(section, 0).double().eval()
    keys = [f"task.classifier={files[1]}", "task.classifier_model=resnet20", "task.kind=defense"]
    net = load_network(config.load(None, keys), cifar10, torch.device("cpu")).double()
    clean = cifar10.test.images[:8].double() / 255
    answers, box = Answers(), BlackBox(lambda images: net(torch.from_numpy(images)).numpy(), numpy=True)
    engine = make_engine("delta", model, ClassifierLoss(box, answers, net))
    engine.bind(clean + 0.25 * torch.randn_like(clean), answers.probabilities(box(clean)))
    coords = np.random.default_rng(0).permutation(1728)[:20]
    exact = engine.index.flatten(engine.gradient())[torch.from_numpy(coords)]
    assert torch.cosine_similarity(dzhpc.cge(engine, coords, 1e-5), exact, dim=0) > 0.999


def test_engines_agree_and_the_box_is_asked_in_one_layout(user):
    values = []
    user.SEEN.clear()
    for kind in ("full", "reuse", "delta"):
        task = task_of(f"zo.engine={kind}", "task.batch_limit=30")
        randomise(task.model)
        torch.manual_seed(0)
        randomise(task.model)
        loss = task.bind(3)
        values.append((loss, task.engine.differences(range(0, task.engine.index.size, 7), 1e-2).double()))
    for loss, differences in values[1:]:
        assert loss == pytest.approx(values[0][0], rel=1e-6)
        assert torch.allclose(differences, values[0][1], rtol=1e-3, atol=1e-6)
    assert {a.dtype for a in user.SEEN} == {np.dtype("float32")}
    assert all(a.flags["C_CONTIGUOUS"] and len(a) <= 30 and a.min() >= 0 and a.max() <= 1 for a in user.SEEN)


def test_features_before_the_first_trainable_layer_are_not_kept():
    kept = []
    for patterns in (["*"], ["model.4.weight"]):
        task = task_of("model.depth=6", f"model.trainable={patterns}".replace("4", "10"))
        task.bind(0)
        kept.append(task.engine.peak_bytes)
    assert kept[1] < 0.4 * kept[0]


def test_the_noise_of_a_step_is_the_same_for_base_and_perturbed_queries_and_differs_between_steps():
    task = task_of("zo.engine=full", "task.sigma=0.5")
    clean, noisy = task.batch(4)
    noise = (noisy - clean) / 0.5
    assert torch.equal(task.batch(4)[1], noisy)
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)
    assert not torch.allclose(noise, (task.batch(5)[1] - task.batch(5)[0]) / 0.5)
    task.bind(4)
    assert task.engine.differences([0, 5], 0.0).tolist() == [0.0, 0.0]  # mu = 0: any other noise would show


def test_evaluation_counts_the_classifiers_right_answers_with_one_noise_draw_an_image():
    task = task_of()
    rows = task.evaluate(range(task.evaluation_parts), 0)
    images, labels = task.data.test.images.float() / 255, task.data.test.labels
    noise = torch.cat([evaluation_noise(images[k : k + 1], range(k, k + 1), task.config) for k in range(20)])
    answers = task.box(task.model(images + noise).clamp(0, 1))
    target = torch.softmax(task.box(images).double(), 1)
    expected = F.cross_entropy(answers.double(), target, reduction="sum")
    assert rows.shape == (4, 3)
    assert rows.sum(0) == pytest.approx([float(expected), int((answers.argmax(1) == labels).sum()), 20], rel=1e-5)
    few = task_of("data.test_limit=5")
    assert few.data.test.labels.tolist() == [labels[k] for k in (0, 4, 8, 12, 16)]
    assert few.cost.evaluation == 10


def test_probabilities_of_a_few_classes_alone_are_said_to_be_taken_for_logits(caplog):
    for answers, said in (([[0.6, 0.0, 0.1]], True), ([[0.9, 0.0, 0.1]], False), ([[0.6, 1.2, 0.1]], False)):
        caplog.clear()
        Answers().probabilities(torch.tensor(answers))
        assert ("do not add up to 1, but to 0.7: they are taken for logits" in caplog.text) == said


def test_answers_are_logits_or_probabilities_as_the_first_ones_show():
    logits, p = torch.tensor([[2.0, -1.0], [0.0, 0.0]]), torch.tensor([[0.26, 0.75], [1.0, 0.0]])  # quantised: sums to 1.01
    assert torch.allclose(Answers().probabilities(logits), torch.softmax(logits.double(), 1))
    answers = Answers()
    assert torch.allclose(answers.probabilities(p), p.double() / torch.tensor([[1.01], [1.0]]).double(), atol=1e-7)
    assert answers.cross_entropy(p, torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()).tolist() == pytest.approx(
        [-np.log(0.75 / 1.01), 0.0], abs=1e-7
    )
    task = task_of("task.classifier=own_defense:softly")
    assert task.bind(0) < 3 and not task.answers.are_logits


def test_first_order_parts_give_the_gradient_of_the_whole_batch_however_they_are_dealt_out(user):
    task = white(user, "zo.estimator=autograd")
    randomise(task.model)
    loss = task.bind(2)
    exact = task.engine.index.flatten(task.engine.gradient())
    alone, gradient = task.shared.join(task.shared.rows(range(PARTS), 2))
    dealt = np.empty((PARTS, 1 + task.engine.index.size))
    for rank in range(3):
        dealt[rank::3] = task.shared.rows(range(rank, PARTS, 3), 2)
    assert alone == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(gradient, exact, rtol=1e-4, atol=1e-6)
    assert torch.equal(task.shared.join(dealt)[1], gradient)


@pytest.mark.parametrize(("size", "part"), [(16, 2), (3, 1)])
def test_pre_training_moves_batch_norm_by_the_mean_of_its_parts(size, part):
    task = task_of("task.loss=mse", "zo.estimator=autograd", "model.batch_norm=true", f"data.batch_size={size}", keys=SMALL)
    bn = task.model.model[3]
    clean, noisy = task.batch(0)
    loss, _ = task.shared.join(task.shared.rows(range(PARTS), 0))
    assert int(bn.num_batches_tracked) == 1
    seen = torch.relu(task.model.model[0](noisy))
    means = torch.stack([task.model.model[2](one).mean((0, 2, 3)) for one in seen.split(part)])
    assert torch.allclose(bn.running_mean, 0.1 * means.mean(0), atol=1e-6)
    assert loss == pytest.approx(float(F.mse_loss(noisy, clean)), rel=1e-5)  # a new denoiser is the identity
    assert np.isnan(task.evaluate(range(1), 0)[0, 1])  # no classifier, no accuracy


def test_dncnn_loads_kairs_weights_and_denoises(data_root, cifar10):
    file = data_root / "weights" / "dncnn-color-blind.pth"
    if not file.exists():
        pytest.skip(f"trained weights: {file} does not exist; set DZHPC_DATA")
    model = zoo.build(config.Model(name="dncnn", weights=str(file)), 0)
    clean = cifar10.test.images[:32].float() / 255
    with torch.no_grad():
        error = model(clean + 0.25 * torch.randn_like(clean)) - clean
    assert -10 * float((error**2).mean((1, 2, 3)).log10().mean()) == pytest.approx(23.75, abs=0.75)  # dB, over all test images
    assert sum(isinstance(m, nn.BatchNorm2d) for m in DnCNN(5, 4, batch_norm=True).modules()) == 3


def test_a_frozen_network_gives_the_answers_of_the_network():
    model = resnet20()
    with torch.no_grad():
        model(torch.randn(32, 3, 32, 32))  # moves the statistics
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    images = torch.rand(40, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()((images - mean[:, None, None]) / std[:, None, None])
        frozen = Frozen(model, mean, std, (3, 32, 32))
        assert torch.allclose(frozen(images), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())


class Twice(nn.Module):
    """A convolution that is called twice, with a BatchNorm each time."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 3, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x):
        for norm in self.norms:
            x = norm(self.conv(x)).relu()
        return x.mean((2, 3))


@pytest.mark.parametrize("kind", ["twice", "hook", "weight_norm", "scaled"])
def test_a_network_that_torch_folds_wrongly_is_frozen_as_it_is(kind):
    model = Twice() if kind == "twice" else nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    if kind == "hook":
        model[0].register_forward_hook(lambda module, args, out: 2 * out)
    if kind == "weight_norm":
        torch.nn.utils.weight_norm(model[0])
    for _ in range(3):
        model(2 + torch.randn(32, 3, 6, 6))  # moves the statistics
    images = torch.rand(40, 3, 6, 6)
    expected = model.eval()(images).detach()
    frozen = Frozen(model, torch.zeros(3), torch.ones(3), (3, 6, 6))
    assert torch.allclose(frozen(images), expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()) == (kind != "scaled")


def test_trainable_patterns_freeze_the_others():
    section = config.Model(name="dncnn", depth=3, width=4, trainable=["model.4.*"])
    assert [n for n, p in zoo.build(section, 0).named_parameters() if p.requires_grad] == ["model.4.weight", "model.4.bias"]
    section.trainable = ["model.4.*", "modle.0.weight"]
    with pytest.raises(InputError, match=r'model.trainable: no parameter matches "modle.0.weight"; the model has model.0.weight'):
        zoo.build(section, 0)


def test_a_defence_is_loaded_from_a_checkpoint_a_run_folder_or_an_input(user, tmp_path):
    task = white(user, "data.test_limit=5", "model.trainable=['model.4.weight']")
    randomise(task.model)
    tensors = dict(params=dict(task.model.named_parameters()), buffers={}, optimizer={})
    state = State(
        config=task.config.to_toml(), history=[], step=3, epoch=1.0, queries=0, wall_time_s=0.0, run_uuid="", seed=0, lpr=None,
        model_sha256=model_sha256(task.model), coordinates=np.arange(3), env={}, partial=None, **tensors,
    )  # fmt: skip
    folder = runfolder.RunFolder(tmp_path / "run")
    folder.create()
    folder.save(state, 2)
    (tmp_path / "input.toml").write_text(task.config.to_toml())
    noisy = torch.rand(9, 3, 8, 8)
    with torch.no_grad():
        expected = task.box(task.model(noisy).clamp(0, 1)).argmax(1)
    cpu = torch.device("cpu")
    for source in (tmp_path / "run", folder.checkpoint_files()[0]):
        defense = load_defense(source, cpu)
        assert isinstance(defense, Defense) and len(defense.data.test) == 20 and defense.classes == ["0", "1", "2", "3"]
        assert torch.equal(defense.classify(noisy), expected)
    around = zoo.build(config.Model(name="ae-ds", depth=3, width=5, image_size=8, weights=str(tmp_path / "run")), 7)
    assert torch.equal(around.denoiser.model[2].weight, task.model.model[2].weight)
    again = zoo.build(config.Model(name="dncnn", depth=3, width=5, weights=str(tmp_path / "run")), 7)
    assert torch.equal(again.model[2].weight, task.model.model[2].weight)  # weights of a run folder are its newest
    bare = load_defense(tmp_path / "input.toml", cpu, without_denoiser=True)
    assert torch.equal(bare.classify(noisy), task.box(noisy).argmax(1))
    assert torch.equal(load_defense(tmp_path / "input.toml", cpu).denoise(noisy), noisy)  # a new denoiser is the identity
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_defense(tmp_path, cpu)


def test_a_record_of_certificates_is_of_one_classifier_and_one_test_set(user, tmp_path):
    args = parser().parse_args(["i.toml"])

    def record(name, *changes, flip=False):
        task = white(user, *changes)
        pixels = data.DataSet(task.data.train, task.data.test, task.data.mean, task.data.std, task.data.classes)
        if flip:
            pixels.test = data.Split(pixels.test.images.flip(3), pixels.test.labels)
        defense = Defense(task.config, pixels, task.model, task.box, torch.contiguous_format)
        return Certification(World(), defense, args, tmp_path, tmp_path / f"{name}.h5", None)

    about = record("old").about
    certificates.save(tmp_path / "old.h5", [], {k: v for k, v in about.items() if k not in ("test_set", "normalisation")})
    assert record("old").open() == {}  # of an earlier version
    others = {"test_set": ([], True), "normalisation": (["task.classifier_mean=[0.5,0.5,0.5]"], False)}
    for key, (changes, flip) in others.items():
        certificates.save(tmp_path / f"{key}.h5", [], about)
        with pytest.raises(CheckpointError, match=f"was written with {key} = "):
            record(key, *changes, flip=flip).open()
    task = white(user)
    state = State(config=task.config.to_toml(), history=[], step=1, epoch=1.0, queries=0, wall_time_s=0.0, run_uuid="", seed=0,
                  lpr=None, model_sha256="", coordinates=np.arange(1), env={}, partial=None, params={}, buffers={},
                  optimizer={})  # fmt: skip
    folder = runfolder.RunFolder(tmp_path / "run")
    folder.create()
    task.config.task.classifier, said = str(folder.path), []
    for step in (1, 2):  # the run of the classifier has gone on
        state.step = step
        folder.save(state, 2)
        said.append(classifier_of(Defense(task.config, task.data, None, None, torch.contiguous_format)))
    assert said[0].startswith(f"{folder.path} (SHA-256 ") and said[0] != said[1]


def test_a_restart_knows_another_classifier_under_the_same_name(user, tmp_path):
    def found():
        keys = f"task.classifier={tmp_path / 'net.th'}", "task.classifier_model=own_defense:Net", "task.batch_limit=64"
        return fingerprint(task_of(*keys, keys=SMALL).examples())

    torch.save(net := user.Net().state_dict(), tmp_path / "net.th")
    assert (before := found()) == found()
    net["fc.bias"][2] += 1
    torch.save(net, tmp_path / "net.th")
    assert found() != before


def test_what_depends_on_company_cannot_be_certified(user):
    task, layout = white(user), torch.contiguous_format
    Defense(task.config, task.data, task.model, task.box, layout).try_out()
    mixed = nn.BatchNorm2d(3, track_running_stats=False).eval()  # by the statistics of whatever is in the call
    with pytest.raises(InputError, match=r"model.name = dncnn: answers change, by .* what else is in the call"):
        Defense(task.config, task.data, mixed, task.box, layout).try_out()
    task.box._function.model = nn.Sequential(mixed, task.box._function.model)
    with pytest.raises(InputError, match=r"net\.th: answers change"):
        task.try_box()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["task.classifier=own_defense:nobody"], "has no 'nobody'"),
        (["task.classifier=missing.th", "task.classifier_model=resnet20"], "task.classifier = missing.th: cannot be read"),
        (["zo.estimator=autograd"], "a function has no autograd"),
        (["sparsity.scores=fo-grasp", "sparsity.ratio=0.5"], "a function has no autograd"),
        (["model.name=resnet20", "model.classes=4"], "a denoiser keeps the shape"),
        (["data.name=digits", "model.channels=3"], "cannot take inputs .*expected input.*3 channels"),
    ],
)
def test_what_does_not_fit_is_refused(keys, message):
    dropped = tuple(k for k in FUNCTION if not (keys[0].startswith("model.name") and k.startswith("model.")))
    with pytest.raises(InputError, match=message):
        task_of(*keys, keys=dropped)


def test_a_denoiser_that_needs_the_contiguous_layout_has_it():
    task = task_of("model.name=own_defense:Flat", keys=[k for k in FUNCTION if not k.startswith("model.")])
    assert task.model.weight.is_contiguous() and not task.model.weight.is_contiguous(memory_format=torch.channels_last)
    assert task.bind(0) > 0 and task.evaluate(range(4), 0)[:, 2].sum() == 20


def test_answers_of_another_number_of_classes_are_refused():
    with pytest.raises(InputError, match=r"own_defense:of_three: gave \[10, 3\] for 10 images; expected \[10, 4\]"):
        task_of("task.classifier=own_defense:of_three").bind(0)
    with pytest.raises(InputError, match=r"needs task\.classifier"):
        config.load(None, list(SMALL))


@pytest.mark.parametrize("name", ["of_three", "column", "flat"])
def test_certified_classes_are_those_of_the_data_set(name, tmp_path):
    keys = [f'{k.partition("=")[0]}="{k.partition("=")[2]}"' for k in ("kind=defense", f"classifier=own_defense:{name}")]
    (tmp_path / "i.toml").write_text("[task]\n" + "\n".join(keys) + '\n[data]\nname = "own_defense:images"\n')
    defense = load_defense(tmp_path / "i.toml", torch.device("cpu"), without_denoiser=True)
    with pytest.raises(InputError, match=rf"own_defense:{name}: gave \[5.*\] for 5 images; expected \[5, 4\]"):
        defense.classify(torch.rand(5, 3, 8, 8))


def test_a_logit_of_minus_infinity_excludes_a_class():
    task = task_of("task.classifier=own_defense:excluding")
    assert np.isfinite(task.bind(0))
    assert task.engine.differences(np.arange(3), 1e-3).isfinite().all()
    rows = task.evaluate(range(task.evaluation_parts), 0)
    assert np.isfinite(rows).all()
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    target = torch.tensor([[0.25, 0.0, 0.75]]).double()
    expected = -(target * F.log_softmax(torch.tensor([[1.0, -1e9, 2.0]]).double(), 1)).sum()
    assert Answers().cross_entropy(logits, target).tolist() == pytest.approx([float(expected)])
    for name in ("nowhere", "unbounded"):
        with pytest.raises(NumericalError, match=f"own_defense:{name} gave answers that are not finite"):
            task_of(f"task.classifier=own_defense:{name}").bind(0)


@pytest.mark.parametrize(("estimator", "scores"), [("cge", "fo-grasp"), ("fa", "random"), ("autograd", "random")])
def test_counted_is_what_a_white_boxs_copy_is_asked(user, estimator, scores):
    task = white(user, f"zo.estimator={estimator}", f"sparsity.scores={scores}", "sparsity.ratio=0.5", "zo.engine=full")
    asked = task.box.queries
    task.shared.rows(range(PARTS), 0) if task.shared else task.bind(0)
    assert task.box.queries - asked == task.cost.bind == (10 if estimator == "autograd" else 20)


def test_float_images_must_be_pixels():
    one, sound = (data.Split(torch.full((4, 3, 2, 2), value), torch.zeros(4).long()) for value in (1.5, 0.5))
    from dzhpc.tasks.defense.inference import as_pixels

    with pytest.raises(InputError, match=r"images from 1.5 to 1.5; a defence needs them in \[0, 1\]"):
        as_pixels(data.DataSet(one, one, torch.zeros(3), torch.ones(3), ["a"]))
    with pytest.raises(InputError, match=r"images from 0\.5 to 1\.5"):
        as_pixels(data.DataSet(sound, one, torch.zeros(3), torch.ones(3), ["a"]))


def test_the_gradient_through_a_queried_code_is_that_of_autograd(user):
    """ZO-AE-DS: CGE on the code, the chain rule before it; the decoder and the box are only ever asked."""
    task = task_of("model.name=ae-ds", "model.latent=12", "model.hidden=4", "zo.estimator=latent", "zo.mu=1e-3")
    white_box = ClassifierLoss(task.box, task.answers, user.NET)
    clean, noisy = task.batch(1)
    exact = torch.autograd.grad(white_box(task.model(noisy), task.targets(clean)), task.engine.index.parameters)
    asked = task.box.queries
    _, gradient = task.shared.join(task.shared.rows(range(PARTS), 1))
    assert task.box.queries - asked == task.cost.bind == 10 * (2 + 12)
    names = [n for n, _ in task.model.named_parameters() if not n.startswith("decoder")]
    assert task.engine.index.names == names  # Adam would move the decoder by weight decay alone
    mine, right = task.engine.index.split(gradient), dict(zip(task.engine.index.names, exact, strict=True))
    a, b = (torch.cat([g[n].flatten() for n in names]) for g in (mine, right))
    assert torch.cosine_similarity(a, b, dim=0) > 0.999
    assert torch.linalg.vector_norm(a) / torch.linalg.vector_norm(b) == pytest.approx(1, abs=0.02)
    with pytest.raises(InputError, match="leaves nothing to train in front of the code"):
        task_of("model.name=ae-ds", "model.latent=12", "zo.estimator=latent", "model.trainable=['decoder.*']")
    with pytest.raises(InputError, match="model dncnn has no encode and decode"):
        task_of("zo.estimator=latent")

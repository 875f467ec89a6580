"""Every operation that engine delta has a rule for, as pieces that random networks are made of.

A piece is a function (draw, x) -> module: ``draw`` picks options, ``x`` is an example of what the module will be given.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Do(nn.Module):
    """A function of the input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Use(nn.Module):
    """A function of the input and of parameters that the network reads by itself."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function, self.own = function, nn.ParameterList([0.5 * torch.randn(s) for s in shapes])

    def forward(self, x):
        return self.function(x, *self.own)


class Wrap(nn.Module):
    """A function of the input and of what a layer makes of it."""

    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x):
        return self.function(x, self.layer(x))


def _pair(draw, low, high):
    return draw.integer(low, high), draw.integer(low, high)


def _divisor(draw, *numbers):
    return draw.choice([k for k in range(1, min(numbers) + 1) if all(n % k == 0 for n in numbers)])


# --- images [B, C, H, W] ---------------------------------------------------------------------------------------------------


def convolution(draw, x, functional=False):
    channels, out = x.shape[1], draw.integer(1, 4)
    groups = _divisor(draw, channels, out)
    kernel, dilation = _pair(draw, 1, 3), _pair(draw, 1, 2)
    if draw.yes():
        padding, stride = draw.choice(["same", "valid"]), (1, 1)
    else:
        padding, stride = _pair(draw, 0, 2), _pair(draw, 1, 3)
    if functional:
        function = lambda x, w, *b: F.conv2d(x, w, *(b or [None]), stride, padding, dilation, groups)  # noqa: E731
        return Use(function, (out, channels // groups, *kernel), *([(out,)] if draw.yes() else []))
    mode = draw.choice(["zeros", "reflect", "replicate", "circular"])
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, draw.yes(), mode)


def _pooling(draw):
    kernel = _pair(draw, 1, 3)
    return dict(kernel_size=kernel, stride=_pair(draw, 1, 3), padding=tuple(draw.integer(0, k // 2) for k in kernel))


def max_pool(draw, x, functional=False):
    options = _pooling(draw) | dict(dilation=_pair(draw, 1, 2), ceil_mode=draw.yes())
    return Do(lambda x: F.max_pool2d(x, **options)) if functional else nn.MaxPool2d(**options)


def average_pool(draw, x, functional=False):
    options = _pooling(draw) | dict(ceil_mode=draw.yes(), count_include_pad=draw.yes(), divisor_override=draw.choice([None, 3]))
    return Do(lambda x: F.avg_pool2d(x, **options)) if functional else nn.AvgPool2d(**options)


def adaptive(module, function):
    def make(draw, x):
        size = draw.choice([1, (2, None), (None, 3), _pair(draw, 1, 4)])
        return Do(lambda x: function(x, size)) if function else module(size)

    return make


def pad(draw, x):
    mode = draw.choice(["constant", "constant", "reflect", "replicate", "circular"])
    axes = draw.integer(1, 4) if mode == "constant" else 2
    low = -1 if mode == "constant" else 0
    border = [draw.integer(low, 2) for _ in range(2 * axes)]
    return Do(lambda x: F.pad(x, border, mode=mode, value=0.7 if mode == "constant" else None))


def batch_norm_2d(draw, x):
    return _settled(nn.BatchNorm2d(x.shape[1], affine=draw.yes(), track_running_stats=draw.yes()))


def _settled(norm):
    """Running statistics that say something."""
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


# --- anything ---------------------------------------------------------------------------------------------------------------


def batch_norm_1d(draw, x):
    return _settled(nn.BatchNorm1d(x.shape[1], affine=draw.yes(), track_running_stats=draw.yes()))


def batch_norm_3d(draw, x):
    norm = _settled(nn.BatchNorm3d(x.shape[1]))
    return Wrap(nn.Sequential(Do(lambda x: x.unsqueeze(2)), norm, Do(lambda x: x.squeeze(2))), lambda x, y: y)


def layer_norm(draw, x, functional=False):
    shape = tuple(x.shape[-draw.integer(1, x.ndim - 1) :])
    if not functional:
        return nn.LayerNorm(shape, elementwise_affine=draw.yes(), bias=draw.yes())
    if draw.yes():
        return Do(lambda x: F.layer_norm(x, shape))
    return Use(lambda x, w, b: F.layer_norm(x, shape, w, b, 1e-3), shape, shape)


def group_norm(draw, x):
    return nn.GroupNorm(_divisor(draw, x.shape[1]), x.shape[1], affine=draw.yes())


def softmax(name):
    def make(draw, x):
        dim = draw.integer(-x.ndim, x.ndim - 1)
        return draw.choice(
            [
                Do(lambda x: getattr(torch, name)(x, dim)),
                Do(lambda x: getattr(F, name)(x, dim=dim)),
                Do(lambda x: getattr(x, name)(dim)),
            ]
        )

    return make


def linear(draw, x, functional=False):
    out, bias = draw.integer(1, 5), draw.yes()
    if not functional:
        return nn.Linear(x.shape[-1], out, bias)
    return Use(lambda x, w, *b: F.linear(x, w, *b), (out, x.shape[-1]), *([(out,)] if bias else []))


def _index(draw, size):
    return slice(draw.choice([None, 0, 1, -2]), None, draw.choice([None, 1, 2]))


def slices(draw, x):
    index = tuple(slice(None) if k == 0 else _index(draw, n) for k, n in enumerate(x.shape))
    form, few = draw.integer(0, 4), draw.integer(1, x.ndim)
    if form == 0:  # an added axis, taken away again
        return Do(lambda x: x[index][:, None][:, 0])
    if form == 1:
        return Do(lambda x: x[..., index[-1]])
    if form == 2:
        return Do(lambda x: x[:, [0, -1, 0]])
    if form == 3:
        return Do(lambda x: x[:, -1:])
    return Do(lambda x: x[index[:few]])


def pieces(name):
    """chunk, split or unbind, put together in another order."""

    def make(draw, x):
        dim = draw.integer(1, x.ndim - 1) - draw.choice([0, x.ndim])
        if name == "unbind":
            return Do(lambda x: (lambda parts: parts[0] - parts[x.shape[dim] - 1])(x.unbind(dim)).unsqueeze(dim))
        size = 2 if name == "chunk" else max(1, x.shape[dim] // 2)
        form = draw.yes()

        def function(x):
            parts = getattr(torch, name)(x, size, dim) if form else getattr(x, name)(size, dim)
            return torch.cat([parts[-1], parts[0]], dim=dim)

        return Do(function) if x.shape[dim] > 1 else Do(lambda x: getattr(x, name)(1, dim)[0])

    return make


def join(name):
    def make(draw, x):
        dim = draw.integer(1 - x.ndim, -1)
        constant = torch.randn_like(x)
        tail = draw.choice([lambda x: x, torch.tanh, lambda x: constant])
        if name == "stack":
            return Do(lambda x: torch.stack([x, torch.tanh(x)], 1).mean(1))
        return Do(lambda x: getattr(torch, name)([torch.relu(x), tail(x)], dim))

    return make


def moved_axes(name):
    """permute, transpose, movedim, t."""

    def make(draw, x):
        a, b, order = draw.integer(1, x.ndim - 1), draw.integer(1 - x.ndim, -1), [0, *reversed(range(1, x.ndim))]
        return {
            "permute": one_of(lambda x: x.permute(order), lambda x: torch.permute(x, order)),
            "transpose": one_of(lambda x: x.transpose(a, b), lambda x: torch.transpose(x, a, b)),
            "movedim": one_of(lambda x: x.movedim(a, b), lambda x: torch.movedim(x, a, b)),
            "t": one_of(lambda x: x.flatten(1).t().contiguous().t()),
        }[name](draw, x)

    return make


def reshaped(name):
    """flatten, reshape, view, unflatten, squeeze, unsqueeze, expand, contiguous, and back where that is short."""

    def make(draw, x):
        shape, start = x.shape[1:], draw.integer(1, x.ndim - 1)
        return {
            "flatten": Do(draw.choice([lambda x: torch.flatten(x, start), lambda x: x.flatten(start_dim=start)])),
            "reshape": Do(
                draw.choice([lambda x: x.reshape(x.shape[0], -1, shape[-1]), lambda x: torch.reshape(x, (x.size(0), -1))])
            ),
            "view": Do(lambda x: x.contiguous().view(x.size(0), -1)),
            "unflatten": Do(lambda x: x.flatten(1).unflatten(-1, (-1, shape[-1]))),
            "squeeze": Do(draw.choice([lambda x: x.mean(-1, keepdim=True).squeeze(-1), lambda x: x[:, None].squeeze(1)])),
            "unsqueeze": Do(lambda x: torch.unsqueeze(x, -1).sum(-1)),
            "expand": Do(lambda x: x.unsqueeze(1).expand(-1, 2, *[-1] * len(shape)).mean(1)),
            "contiguous": Do(lambda x: x.transpose(1, -1).contiguous()),
        }[name]

    return make


def arithmetic(name):
    """Two branches, a scalar, a parameter of one element or of one a channel."""

    def make(draw, x):
        forms = {
            "add": [lambda a, b: a + b, lambda a, b: torch.add(a, b, alpha=-0.3), lambda a, b: a.add_(b), lambda a, b: 2 + b],
            "sub": [lambda a, b: a - b, lambda a, b: torch.sub(b, a, alpha=0.3), lambda a, b: 1 - b, lambda a, b: b.sub(3)],
            "mul": [lambda a, b: a * b, lambda a, b: torch.mul(a, b), lambda a, b: 3 * b, lambda a, b: a.mul_(b)],
            "multiply": [lambda a, b: torch.multiply(a, b)],
            "truediv": [lambda a, b: a / (2 + b * b), lambda a, b: 1 / (2 + b * b), lambda a, b: b / 3],
            "div": [lambda a, b: torch.div(a, 2 + b * b), lambda a, b: b.div(0.5)],
        }[name]
        function = draw.choice(forms)
        kind = draw.integer(0, 3)
        if kind == 0:  # residual and gated branches
            return Do(lambda x: function(torch.tanh(x), torch.sigmoid(x)))
        if kind == 1:  # a parameter of no axes
            return Use(lambda x, p: function(torch.tanh(x), p * x), ())
        if kind == 2:  # one a channel, one a place
            return Use(lambda x, p, q: function(x * p, x + q), (x.shape[1], *[1] * (x.ndim - 2)), (1, x.shape[-1]))
        return Use(lambda x, p: function(torch.tanh(x), p), tuple(x.shape[1:]))

    return make


def _tokens(x):
    """What makes [B, T, C] of values like x."""
    return (lambda x: x.flatten(2).transpose(1, 2)) if x.ndim > 2 else (lambda x: x[:, :, None])


def attention(draw, x):
    """Queries, keys and values from one layer; fused or by hand."""
    width, heads = draw.integer(1, 3), draw.integer(1, 2)
    (_, tokens, features), form = _tokens(x)(x).shape, draw.integer(0, 4)
    truth, bias = torch.ones(tokens, tokens).tril(1).bool(), torch.randn(tokens, tokens, dtype=torch.float64)
    truth[0] = draw.yes()  # a row without any key

    def attend(x, qkv):
        q, k, v = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
        out = (
            (lambda: F.scaled_dot_product_attention(q, k, v)),
            (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
            (lambda: F.scaled_dot_product_attention(q, k, v, truth, scale=0.7)),
            (lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=0.0)),
            (lambda: torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width), -1) @ v),
        )[form]()
        return out.transpose(1, 2).flatten(2)

    return nn.Sequential(Do(_tokens(x)), Wrap(nn.Linear(features, 3 * width * heads), attend))


def products(name):
    """matmul and bmm of two changing values, or of one with a parameter."""

    def make(draw, x):
        n, tokens = x.shape[-1], _tokens(x)
        if name == "bmm":
            return Do(lambda x: torch.bmm(tokens(x), torch.tanh(tokens(x)).transpose(1, 2)))
        if draw.yes():
            return Do(lambda x: tokens(x).transpose(-2, -1) @ torch.tanh(tokens(x)))
        return draw.choice([Use(lambda x, w: x @ w, (n, 2)), Use(lambda x, w: torch.matmul(x, w.unsqueeze(0)).tanh(), (n, n))])

    return make


def class_token(draw, x):
    """A token before the others, and a position embedding."""
    tokens = _tokens(x)(x)
    shape = (1, tokens.shape[1] + 1, tokens.shape[2])

    def function(x, token, position):
        return torch.cat([token.expand(x.shape[0], -1, -1), x], dim=1) + position

    return nn.Sequential(Do(_tokens(x)), Use(function, (1, 1, tokens.shape[2]), shape))


def means(name):
    """mean and sum over any axes but the batch's, and over everything."""

    def make(draw, x):
        dims, keep = draw.choice([-1, (-1,), tuple(range(2, x.ndim)) or 1, [x.ndim - 1], [1, -1][: x.ndim - 1]]), draw.yes()
        reduced = draw.choice(
            [
                lambda x: getattr(x, name)(dims, keep),
                lambda x: getattr(torch, name)(x, dim=dims, keepdim=keep),
                lambda x: getattr(x, name)() + x,
            ]
        )
        return Do(lambda x: x * reduced(x)) if keep else Do(reduced)

    return make


def one_of(*functions):
    return lambda draw, x: draw.choice([f if isinstance(f, nn.Module) else Do(f) for f in functions])


def image(piece):
    """Only for [B, C, H, W]; None elsewhere."""
    return lambda draw, x: piece(draw, x) if x.ndim == 4 else None


def functional(piece):
    return lambda draw, x: piece(draw, x, functional=True)


#: key in table.MODULES (a class) or table.FUNCTIONS (a name) -> the piece that has it
PIECES = {
    nn.Conv2d: image(convolution), "conv2d": image(functional(convolution)), nn.Linear: linear, "linear": functional(linear),
    nn.BatchNorm1d: lambda draw, x: batch_norm_1d(draw, x) if x.ndim < 4 else None, nn.BatchNorm2d: image(batch_norm_2d),
    nn.BatchNorm3d: image(batch_norm_3d), nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm, "layer_norm": functional(layer_norm),
    nn.ReLU: lambda draw, x: nn.ReLU(inplace=draw.yes()), "relu": one_of(F.relu, torch.relu, lambda x: x.relu(), torch.relu_),
    nn.ReLU6: lambda draw, x: nn.ReLU6(), "relu6": lambda draw, x: Do(lambda x: F.relu6(4 * x)),
    nn.LeakyReLU: lambda draw, x: nn.LeakyReLU(draw.choice([0.0, 0.01, 0.3, 1.5])),
    "leaky_relu": one_of(F.leaky_relu, lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, negative_slope=2, inplace=True)),
    nn.GELU: lambda draw, x: nn.GELU(draw.choice(["none", "tanh"])),
    "gelu": one_of(F.gelu, lambda x: F.gelu(x, approximate="tanh")), nn.SiLU: lambda draw, x: nn.SiLU(), "silu": one_of(F.silu),
    nn.Sigmoid: lambda draw, x: nn.Sigmoid(), "sigmoid": one_of(torch.sigmoid, lambda x: x.sigmoid()),
    nn.Tanh: lambda draw, x: nn.Tanh(), "tanh": one_of(torch.tanh, lambda x: x.tanh(), lambda x: x.tanh_()),
    nn.Softmax: lambda draw, x: nn.Softmax(draw.integer(-x.ndim, x.ndim - 1)),
    "softmax": softmax("softmax"), "log_softmax": softmax("log_softmax"),
    nn.LogSoftmax: lambda draw, x: nn.LogSoftmax(draw.integer(-x.ndim, x.ndim - 1)),
    "exp": one_of(lambda x: torch.exp(-torch.square(x)), lambda x: (-x).exp()),
    "square": one_of(torch.square, lambda x: x.square()),
    "neg": one_of(lambda x: -x, torch.neg), nn.MaxPool2d: image(max_pool), "max_pool2d": image(functional(max_pool)),
    nn.AvgPool2d: image(average_pool), "avg_pool2d": image(functional(average_pool)),
    nn.AdaptiveMaxPool2d: image(adaptive(nn.AdaptiveMaxPool2d, None)),
    "adaptive_max_pool2d": image(adaptive(None, F.adaptive_max_pool2d)),
    nn.AdaptiveAvgPool2d: image(adaptive(nn.AdaptiveAvgPool2d, None)),
    "adaptive_avg_pool2d": image(adaptive(None, F.adaptive_avg_pool2d)),
    nn.Flatten: lambda draw, x: nn.Flatten(draw.integer(1, x.ndim - 1)),
    nn.Unflatten: lambda draw, x: nn.Unflatten(1, (x.shape[1], 1)) if x.ndim < 4 else None,
    nn.Identity: lambda draw, x: nn.Identity(), nn.Dropout: lambda draw, x: nn.Dropout(0.5).eval(),
    nn.Dropout2d: lambda draw, x: nn.Dropout2d(0.5).eval(),
    "dropout": lambda draw, x: Do(lambda x: F.dropout(x, 0.5, training=False)),
    nn.ZeroPad2d: image(lambda draw, x: nn.ZeroPad2d((1, 0, -1, 2))), "pad": image(pad),
    "add": arithmetic("add"), "sub": arithmetic("sub"), "mul": arithmetic("mul"), "multiply": arithmetic("multiply"),
    "truediv": arithmetic("truediv"), "div": arithmetic("div"), "matmul": products("matmul"), "bmm": products("bmm"),
    "scaled_dot_product_attention": attention, "cat": join("cat"), "concat": join("concat"), "getitem": slices,
    "chunk": pieces("chunk"), "split": pieces("split"), "unbind": pieces("unbind"), "mean": means("mean"), "sum": means("sum"),
    "flatten": reshaped("flatten"), "reshape": reshaped("reshape"), "view": reshaped("view"), "unflatten": reshaped("unflatten"),
    "squeeze": reshaped("squeeze"), "unsqueeze": reshaped("unsqueeze"), "expand": reshaped("expand"),
    "contiguous": reshaped("contiguous"), "permute": moved_axes("permute"), "transpose": moved_axes("transpose"),
    "movedim": moved_axes("movedim"), "t": moved_axes("t"),
    "class token": class_token,
}  # fmt: skip

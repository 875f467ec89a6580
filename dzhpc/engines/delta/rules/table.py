"""Which rule serves which operation, with its traits.

x: base value, D: its change. A rule gets base values and changes of an operation's inputs and returns the change of its output:
exact, without linearisation, and without subtracting nearby numbers.

| operation | change of the output |
|---|---|
| convolution, linear | W * D; only the column W[:, c] where D lives in one channel c |
| add, sub, mean, average pool, cat, pad, slice, reshape, permute | the operation itself, applied to D |
| relu | max(D + min(x, 0), -max(x, 0)) |
| max pool | max_i [(x_i - x_max) + D_i] |
| batch norm (train) | g [D_c/s' - x_c (s' - s)/(s s')], with D_c = D - mean D, s'^2 = s^2 + 2 mean(D_c x_c) + mean(D_c^2) |
| product a b | Da b + a Db + Da Db |
| softmax p | p (e - r)/(1 + r), with e = expm1(D), r = sum p e |
| anything else | f(x + D) - f(x), coordinate by coordinate |

A layer of one's own gets a rule by ``MODULES[MyLayer] = Rule(...)`` before a network with it is bound, and is then kept whole;
what its own parameters do goes into :data:`dzhpc.engines.delta.origins.ORIGINS`. A function or a method of tensors gets one by
``FUNCTIONS[torch.sin] = FUNCTIONS["sin"] = Rule(...)``.
"""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

from dzhpc.engines.delta.rules.convolution import convolution, convolution_function, linear_function, linear_layer
from dzhpc.engines.delta.rules.elementwise import (
    exp,
    gelu,
    gelu_base,
    leaky_relu,
    log_softmax,
    neg,
    relu,
    relu6,
    sigmoid,
    silu,
    softmax,
    square,
    tanh,
)
from dzhpc.engines.delta.rules.normalisation import (
    batch_norm,
    batch_statistics,
    batch_sums,
    group_norm,
    group_norm_statistics,
    layer_norm,
    layer_norm_statistics,
    uses_batch_statistics,
)
from dzhpc.engines.delta.rules.pooling import adaptive_max_pool, average_pool, max_pool
from dzhpc.engines.delta.rules.products import add, attention, bilinear, product, quotient, sub
from dzhpc.engines.delta.rules.rule import FALLBACK, Rule
from dzhpc.engines.delta.rules.structure import cat, dropout, getitem, identity, linear_map, mean, pad, split, view

#: (rule with its traits, torch's layers, names of torch's functions, operators and methods)
ROWS: list[tuple[Rule, tuple[type, ...], str]] = [
    (Rule(linear_map, native=True), (nn.Flatten, nn.Unflatten, nn.ZeroPad2d),
     "sum flatten unflatten reshape permute transpose t movedim squeeze unsqueeze expand"),
    (Rule(view, native=True), (), "view"),
    (Rule(identity, native=True, fusable=True), (nn.Identity,), "contiguous"),
    (Rule(dropout, native=True, fusable=True), (nn.Dropout, nn.Dropout2d), "dropout"),
    (Rule(mean, fusable=True), (), "mean"),
    (Rule(pad, native=True), (), "pad"),
    (Rule(cat, several=True), (), "cat concat"),
    (Rule(getitem, native=True, several=True), (), "getitem"),
    (Rule(split, native=True, lists=True), (), "chunk split unbind"),
    (Rule(add, fusable=True, several=True), (), "add"),
    (Rule(sub, fusable=True, several=True), (), "sub"),
    (Rule(product, fusable=True, several=True), (), "mul multiply"),
    (Rule(quotient, fusable=True, several=True), (), "truediv div"),
    (Rule(bilinear, several=True), (), "matmul bmm"),
    (Rule(attention, several=True), (), "scaled_dot_product_attention"),
    (Rule(convolution, native=True, gives_means=True), (nn.Conv2d,), ""),
    (Rule(convolution_function, several=True), (), "conv2d"),
    (Rule(linear_layer, native=True), (nn.Linear,), ""),
    (Rule(linear_function, several=True), (), "linear"),
    (Rule(relu, fusable=True, kinked=True), (nn.ReLU,), "relu"),
    (Rule(relu6, fusable=True, kinked=True, sharp=True), (nn.ReLU6,), "relu6"),
    (Rule(leaky_relu, fusable=True, kinked=True), (nn.LeakyReLU,), "leaky_relu"),
    (Rule(gelu, fusable=True, sharp=True, tables=gelu_base), (nn.GELU,), "gelu"),
    (Rule(silu, fusable=True), (nn.SiLU,), "silu"),
    (Rule(sigmoid, fusable=True), (nn.Sigmoid,), "sigmoid"),
    (Rule(tanh, fusable=True), (nn.Tanh,), "tanh"),
    (Rule(exp, fusable=True), (), "exp"),
    (Rule(square, fusable=True), (), "square"),
    (Rule(neg, fusable=True), (), "neg"),
    (Rule(softmax), (nn.Softmax,), "softmax"),
    (Rule(log_softmax, fusable=True, sharp=True), (nn.LogSoftmax,), "log_softmax"),
    (Rule(average_pool, fusable=True), (nn.AvgPool2d, nn.AdaptiveAvgPool2d), "avg_pool2d adaptive_avg_pool2d"),
    (Rule(max_pool, fusable=True, sharp=True, kinked=True), (nn.MaxPool2d,), "max_pool2d"),
    (Rule(adaptive_max_pool, fusable=True, sharp=True, kinked=True), (nn.AdaptiveMaxPool2d,), "adaptive_max_pool2d"),
    (Rule(batch_norm, fusable=True, statistics=batch_statistics, normalises=uses_batch_statistics, sums=batch_sums),
     (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ""),
    (Rule(layer_norm, fusable=True, several=True, statistics=layer_norm_statistics), (nn.LayerNorm,), "layer_norm"),
    (Rule(group_norm, fusable=True, statistics=group_norm_statistics), (nn.GroupNorm,), ""),
]  # fmt: skip

#: layer -> its rule
MODULES: dict[type[nn.Module], Rule] = {layer: rule for rule, layers, _ in ROWS for layer in layers}

#: name of a method, or a function itself -> its rule
FUNCTIONS: dict[str | Callable, Rule] = {name: rule for rule, _, names in ROWS for name in names.split()}
FUNCTIONS |= {
    getattr(home, name): rule
    for name, rule in FUNCTIONS.items()
    for home in (torch, F, operator)
    if callable(getattr(home, name, None))
}


def find(node: fx.Node, module: nn.Module | None) -> Rule:
    """The rule of an operation; FALLBACK where there is none, or where the user's hooks change what torch does."""
    if node.op == "call_module":
        hooked = module is not None and (module._forward_hooks or module._forward_pre_hooks)
        return FALLBACK if hooked else MODULES.get(type(module), FALLBACK)
    if node.kwargs.get("rounding_mode") or node.kwargs.get("enable_gqa"):
        return FALLBACK
    return FUNCTIONS.get(node.target, FALLBACK)

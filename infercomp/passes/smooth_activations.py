"""Outliers of activations move into weights, where 8 bits hold them: SmoothQuant (Xiao et al. 2022).

    x = rms_norm(h, g)                    ->    x = rms_norm(h, g / s)
    y = linear(x, w)                            y = linear(x, w * s)            s_j = max|x_j|^a / max|w_j|^(1 - a)

For each layer whose recipe has a ``smooth_alpha``, a; "search" takes for each x the a that changes its linears' outputs
least once both are on 8 bits. Maxima of x are those of the calibration samples, or ``smooth_power`` has a mean take
their place: a scale for each token lets few tokens of large activations count less than one for all. The scales are
divided out of what makes x: a norm's weight and bias, the ``up`` linear of a gated activation, or the linear of the
values behind attention, whose channels a group of query heads shares. They are rounded to powers of two, so that all
quotients and products are exact; Gemma's ``1 + w`` has no exact quotient, so its norm gets a multiplication behind it.
The names and shapes of weights stay. It needs weights that the graph owns (``frozen``), and comes before linears are
merged, where each has its parameter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..codegen.model_graph import ModelGraph, aten, value_of
from ..codegen.ops import gated_activation, layer_norm, linear, rms_norm
from ..runtime.errors import ConfigError
from .calibration import Calibration, Tensors, largest_of_channels, observe, power_mean_of_channels
from .graph_pass import Pass, PassContext
from .linear_recipes import Recipe, Smoothing
from .producing_linears import NoProducerError, Producers, ProducingLinear
from .recipe_layers import check_patterns, layer_names, recipe_for
from .smoothing_scales import SEARCHED_ALPHAS, errors_of_rounding, searched_tokens, smoothing_scales


def run(model_graph: ModelGraph, context: PassContext) -> None:
    recipe = context.config.recipe
    if recipe is None or all(each is None or each.smoothing is None for _, each in recipe.rules):
        return
    if not model_graph.frozen:
        what = "smooth_alpha changes weights, and those of torch.compile are the user's"
        raise ConfigError(what, remedy="use LLM, or a recipe without smooth_alpha", field="smooth_alpha")
    if context.calibration is None:
        what = "smooth_alpha needs samples of text to see the activations' outliers"
        raise ConfigError(what, remedy="LLM(..., calibration=texts)", field="calibration")
    _Smoother(model_graph, context, recipe).smooth(context.calibration)


@dataclass(frozen=True)
class _Producer:
    """What makes a linear's input: ``divide`` takes a scale for each of its channels, which lie [heads, D].

    The linear's channels lie [heads, repeats, D].
    """

    divide: Callable[[torch.Tensor], None]
    num_heads: int = 1
    num_repeats: int = 1

    def shared(self, maxima: torch.Tensor) -> torch.Tensor:
        return maxima.view(self.num_heads, self.num_repeats, -1).amax(1).flatten()

    def repeated(self, scales: torch.Tensor) -> torch.Tensor:
        return scales.view(self.num_heads, 1, -1).expand(-1, self.num_repeats, -1).flatten()


@dataclass(frozen=True)
class _Place:
    """A value that is smoothed: what makes it, the linears that read it, and how."""

    producer: _Producer
    linears: list[fx.Node]
    smoothing: Smoothing

    @property
    def is_searched(self) -> bool:
        return isinstance(self.smoothing.alpha, str)

    def measured(self, values: Sequence[torch.Tensor]) -> Tensors:
        """What stands for the activations of each channel, [K], and, for a search of alpha, tokens [T, K]."""
        power = self.smoothing.power
        of_channels = largest_of_channels(values) if power is None else power_mean_of_channels(values, power)
        return {"channels": of_channels, **({"tokens": searched_tokens(values)} if self.is_searched else {})}


class _Smoother:
    def __init__(self, model_graph: ModelGraph, context: PassContext, recipe: Recipe) -> None:
        self._model_graph = model_graph
        self._context = context
        self._recipe = recipe
        self._producers = Producers(model_graph)

    def smooth(self, calibration: Calibration) -> None:
        names = {node: [layer_names(self._model_graph, node.args[1])] for node in self._linears()}
        check_patterns(self._recipe, names, self._context, is_whole=True)
        places = self._places(names)
        layers = {source: names[place.linears[0]][0][0] for source, place in places.items()}
        scales: dict[fx.Node, torch.Tensor] = {}

        def visit(source: fx.Node, measured: Tensors) -> None:
            scales[source] = self._scales_for(measured, places[source])

        def measure(source: fx.Node, values: Sequence[torch.Tensor]) -> Tensors:
            return places[source].measured(values)

        # Not of alpha, so that another alpha finds the same again.
        powers = [f"{source.name} {place.smoothing.power} {place.is_searched}" for source, place in places.items()]
        observe(self._model_graph, calibration, layers, f"smooth_activations {powers}", measure, visit)
        for source, place in places.items():
            place.producer.divide(scales[source])
            for node in place.linears:
                self._multiply(node.args[1], place.producer.repeated(scales[source]), _input_dim(node))

    def _places(self, names: Mapping[fx.Node, Sequence[Sequence[str]]]) -> dict[fx.Node, _Place]:
        """By what linears read, for all that are to be smoothed and can be."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in names:
            readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
        places = {}
        for source, linears in readers.items():
            recipes = [recipe_for(self._recipe, names[node], node) for node in linears]
            smoothings = {each.smoothing if each is not None else None for each in recipes}
            if smoothings == {None}:
                continue
            try:
                producer = self._producer(source, linears, len(smoothings))
            except NoProducerError as error:
                self._context.near_miss(linears[0], str(error))
                continue
            smoothing = smoothings.pop()
            if smoothing is not None and self._context.claim(linears[0]) is not None:
                places[source] = _Place(producer, linears, smoothing)
        return places

    def _linears(self) -> list[fx.Node]:
        return self._model_graph.calls(linear.overload)

    def _scales_for(self, measured: Tensors, place: _Place) -> torch.Tensor:
        """The scales to divide out of what the producer makes."""
        producer, linears, alpha = place.producer, place.linears, place.smoothing.alpha
        of_values = producer.shared(measured["channels"])
        of_weights = producer.shared(torch.stack([self._largest_of_inputs(node) for node in linears]).amax(0))
        if not isinstance(alpha, str):
            return smoothing_scales(of_values, of_weights, alpha)
        weights = [self._rows_of_weight(node) for node in linears]
        candidates = {each: smoothing_scales(of_values, of_weights, each) for each in SEARCHED_ALPHAS}
        scales = {each: producer.repeated(found) for each, found in candidates.items()}
        errors = errors_of_rounding(measured["tokens"], weights, scales)
        return candidates[min(errors, key=lambda each: errors[each])]

    def _rows_of_weight(self, node: fx.Node) -> torch.Tensor:
        """A linear's weight [N, K]."""
        tensor = self._model_graph.weights[node.args[1].name].detach()  # type: ignore[union-attr]
        return tensor if _input_dim(node) else tensor.t()

    def _largest_of_inputs(self, node: fx.Node) -> torch.Tensor:
        return self._rows_of_weight(node).abs().amax(0).float()

    def _multiply(self, weight: fx.Node, scales: torch.Tensor, dim: int) -> None:
        tensor = self._model_graph.weights[weight.name].detach()
        shape = [-1 if each == dim else 1 for each in range(tensor.dim())]
        self._model_graph.weights[weight.name] = tensor * scales.to(tensor).view(shape)

    def _producer(self, source: fx.Node, linears: list[fx.Node], num_smoothings: int) -> _Producer:
        if value_of(source).dtype == torch.float16:
            raise NoProducerError("float16 has too few exponents for its weights to be scaled exactly")
        if num_smoothings > 1:
            raise NoProducerError("linears of one input are to be smoothed in different ways")
        for node in linears:
            self._producers.require_own(node.args[1], "its weight")
        self._producers.require_readers(source, linears)
        if source.target in (rms_norm.overload, layer_norm.overload):
            return self._norm(source)
        if source.target == gated_activation.overload:
            return self._gated(source)
        if source.target == aten.reshape.default:
            return self._attention(source)
        raise NoProducerError(f"its input is made by {source.target}, which scales cannot be divided out of")

    def _norm(self, norm: fx.Node) -> _Producer:
        parameters = norm.args[1:3] if norm.target == layer_norm.overload else norm.args[1:2]
        if len(norm.args) > 3 and norm.target == rms_norm.overload and norm.args[3]:
            return _Producer(lambda scales: self._multiply_behind(norm, scales))
        if parameters[0] is None:
            raise NoProducerError("the norm before it has no weight")
        vectors = [each for each in parameters if each is not None]
        for vector in vectors:
            self._producers.require_own(vector, "a parameter of the norm before it")

        def divide(scales: torch.Tensor) -> None:
            for vector in vectors:
                self._multiply(vector, 1 / scales, 0)

        return _Producer(divide)

    def _multiply_behind(self, norm: fx.Node, scales: torch.Tensor) -> None:
        readers = list(norm.users)
        inverse = (1 / scales).to(value_of(norm))
        with self._model_graph.fake_mode:
            fake = torch.empty(inverse.shape, dtype=inverse.dtype, device=inverse.device)
        factor = self._model_graph.add_placeholder(f"{norm.name}_smoothing", fake, weight=inverse)
        with self._model_graph.inserting_before(norm.next) as emit:
            scaled = emit(aten.mul.Tensor, norm, factor)
        for reader in readers:
            reader.replace_input_with(norm, scaled)

    def _gated(self, gated: fx.Node) -> _Producer:
        return _Producer(self._rows_of(self._producers.linear(gated.args[1], [gated], "up")))  # type: ignore[arg-type]

    def _attention(self, source: fx.Node) -> _Producer:
        """The scales of o's input go into v's rows: attention is linear in the values, head by head."""
        found = self._producers.values(source)
        return _Producer(self._rows_of(found.linear), found.num_heads, found.num_repeats)

    def _rows_of(self, producer: ProducingLinear) -> Callable[[torch.Tensor], None]:
        def divide(scales: torch.Tensor) -> None:
            self._multiply(producer.weight, 1 / scales, producer.output_dim)
            if producer.bias is not None:
                self._multiply(producer.bias, 1 / scales, 0)

        return divide


def _input_dim(node: fx.Node) -> int:
    return 0 if node.kwargs.get("transposed", False) else 1


SMOOTH_ACTIVATIONS = Pass(
    "smooth_activations",
    run,
    after=("recognize_norm", "recognize_attention", "recognize_gated_mlp", "convert_attention"),
)

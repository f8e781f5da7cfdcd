"""transformers' model classes, bound to weights in the arena and to paged attention."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.arrival import Gate, enters_before_use, find_gates
from services.gpu_agent.engine.attention import ATTENTION, LayerAttention, PagedStep, attending
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.weights.layout import ImageLayout

# What transformers passes to attention functions for information (is_causal is looked at by itself).
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits", "is_causal"}
# What changes it and is computed by the engine.
_COMPUTED = {"softcap", "s_aux"}
# Layers whose mask is the causal one, or that within the window passed to the attention function.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Rotary embeddings that transformers computes anew when the longest sequence of a batch exceeds a length.
_LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic"}
_PROBE_TOKENS = 8
# Mixtures of experts: one grouped GEMM over the tokens sorted by expert. It waits for nothing from the GPU, so that it
# can be captured, and is exact on the CPU too; on the meta device torch has it for bfloat16 only.
_EXPERTS = "grouped_mm"
_PROBED_EXPERTS = "batched_mm"


class UnsupportedArchitecture(ValueError):
    """The engine would not compute what transformers does; the message says why."""


class BoundModel:
    """A model whose parameters are the arena's memory. What it computes with must be resident (see arrival.Behind)."""

    def __init__(
        self,
        module: PreTrainedModel,
        weights: WeightRange,
        gates: tuple[Gate, ...],
        kv_spec: KvSpec,
        attention: tuple[LayerAttention, ...],
    ) -> None:
        self.module = module
        self.weights = weights
        self.gates = gates
        """Which of its parts need how much of the weights, as transformers' class computes."""
        self.kv_spec = kv_spec
        self.attention = attention
        """What each layer's attention is, in layer order."""
        self.vocab_size: int = module.get_input_embeddings().num_embeddings

    @torch.inference_mode()
    def compute(self, step: PagedStep, token_ids: list[int], last_rows: list[int]) -> torch.Tensor:
        """Computes a flattened batch and returns float logits (len(last_rows), vocabulary) of the rows asked for."""
        with attending(step):
            output = self.module(
                input_ids=torch.tensor([token_ids]),
                position_ids=step.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=torch.tensor(last_rows, dtype=torch.long),
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits


def inspect_model(config: Any, dtype: torch.dtype, block_tokens: int = 16, context_tokens: int | None = None) -> KvSpec:
    """What KV cache a model needs, from transformers' config of it. Needs no memory.

    context_tokens: the longest context that will be served; without it, the longest the model was made for. Raises
    UnsupportedArchitecture where the engine cannot serve it.
    """
    kv_spec = _kv_spec(inspect_attention(config), dtype, block_tokens)
    _check_context(config, context_tokens)
    return kv_spec


def inspect_attention(config: Any) -> tuple[LayerAttention, ...]:
    """What attention each of a model's layers does, in layer order. Needs no memory; raises UnsupportedArchitecture."""
    return _inspect(config)[0]


def _inspect(config: Any) -> tuple[tuple[LayerAttention, ...], bool]:
    """What inspect_attention tells, and whether the model enters its parts before it uses their weights."""
    module = _on_meta(config)
    _fix_frequencies(module)
    _check_config(module)
    facts: list[LayerAttention] = []
    in_order = enters_before_use(module, lambda: facts.extend(_probe(module)))
    name = type(module).__name__
    if [fact.layer for fact in facts] != list(range(module.config.get_text_config().num_hidden_layers)):
        raise UnsupportedArchitecture(f"{name} does not attend once in each of its layers")
    shapes = {(fact.kv_heads, fact.head_dim) for fact in facts}
    if len(shapes) != 1:
        raise UnsupportedArchitecture(f"{name} has layers with different KV heads: {sorted(shapes)}")
    _check_windows(module, [fact.window for fact in facts])
    return tuple(facts), in_order


def has_experts(config: Any) -> bool:
    """Whether a model is a mixture of experts."""
    return bool(_on_meta(config)._can_set_experts_implementation())


def build_model(config: Any, layout: ImageLayout, weights: WeightRange, block_tokens: int = 16) -> BoundModel:
    """Builds transformers' class for a config with its tensors over `weights`, which need not be resident yet.

    The binding is made once and outlives eviction and reload; what the class computes itself (rotary frequencies) is on
    the weights' device. The context served must have been checked by inspect_model. Raises UnsupportedArchitecture.
    """
    attention, in_order = _inspect(config)
    module = _on_meta(config)
    # Before the parameters are bound: transformers' initialisation then finds them on the meta device, where writing
    # random numbers to them does nothing.
    _fill_buffers(module)
    _fix_frequencies(module)
    _set_experts(module, _EXPERTS)
    _bind(module, layout, weights)
    gates = find_gates(module, layout, in_order)
    return BoundModel(module, weights, gates, _kv_spec(attention, layout.dtype, block_tokens), attention)


def _on_meta(config: Any) -> PreTrainedModel:
    """The model without memory, its parameters' dtype of no meaning."""
    try:
        # Given a dtype, transformers would for a while change the default of the whole process, under the feet of
        # the engine's thread.
        with torch.device("meta"):
            module: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=ATTENTION, dtype=None, trust_remote_code=False
            )
    except Exception as error:  # foreign code: whatever it raises means that it cannot be built
        raise UnsupportedArchitecture(
            f"transformers cannot build it over the engine's attention: {_brief(error)}"
        ) from error
    return module.eval()


def _kv_spec(attention: tuple[LayerAttention, ...], dtype: torch.dtype, block_tokens: int) -> KvSpec:
    return KvSpec(len(attention), attention[0].kv_heads, attention[0].head_dim, dtype, block_tokens)


def _check_config(module: PreTrainedModel) -> None:
    """Refuses what the probe cannot see."""
    name, config = type(module).__name__, module.config.get_text_config()
    if module.config.is_encoder_decoder:
        raise UnsupportedArchitecture(f"{name} is an encoder-decoder model")
    if getattr(module, "_is_stateful", False):
        raise UnsupportedArchitecture(f"{name} keeps a recurrent state beside its KV cache")
    if not getattr(config, "is_causal", True):
        raise UnsupportedArchitecture(f"{name} is configured with is_causal=false")
    if "logits_to_keep" not in inspect.signature(module.forward).parameters:
        raise UnsupportedArchitecture(f"{name} cannot compute the logits of chosen tokens only")
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise UnsupportedArchitecture(f"{name} has layers of the kinds {sorted(strange)}")


def _check_context(config: Any, context_tokens: int | None) -> None:
    """Refuses contexts beyond the length up to which the model's rotary embeddings are the same for all sequences."""
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    context = own if context_tokens is None else context_tokens
    for rope in _rope_parameters(text):
        kind = rope.get("rope_type")
        if kind not in _LENGTH_DEPENDENT_ROPE:
            continue
        limit = rope.get("original_max_position_embeddings", own) if kind == "longrope" else own
        if context is None or limit is None or context > limit:
            raise UnsupportedArchitecture(
                f"its rotary embeddings ({kind}) depend on the longest sequence of a batch where that exceeds {limit} "
                f"tokens; set limits.max_context_tokens to at most {limit}"
            )


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    # Flat, or one dictionary per kind of layer.
    return [part for part in (rope, *rope.values()) if isinstance(part, dict)]


def _fix_frequencies(module: PreTrainedModel) -> None:
    """Keeps rotary frequencies that depend on the length of sequences as they are: those of short ones.

    transformers looks at the batch in each pass to choose them, which a captured graph could not. See _check_context.
    """
    for part in module.modules():
        kind = getattr(part, "rope_type", None)
        if isinstance(kind, str) and kind in _LENGTH_DEPENDENT_ROPE:
            part.rope_type = "default"  # it is only asked whether it is one of those
        elif isinstance(kind, dict):
            part.rope_type = {
                layer: "default" if of_layer in _LENGTH_DEPENDENT_ROPE else of_layer for layer, of_layer in kind.items()
            }


def _probe(module: PreTrainedModel) -> list[LayerAttention]:
    """Runs a forward pass on the meta device and notes what reaches the attention function."""
    facts: list[LayerAttention] = []

    def attend(
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        unknown = sorted(n for n, v in extra.items() if v is not None and n not in _HARMLESS | _COMPUTED)
        if unknown:
            raise UnsupportedArchitecture(f"its attention needs {', '.join(unknown)}, which the engine does not have")
        if not extra.get("is_causal", getattr(layer, "is_causal", True)):
            raise UnsupportedArchitecture("its attention is not causal")
        if key.shape != value.shape or key.shape[2] != _PROBE_TOKENS or query.shape[-1] != key.shape[-1]:
            raise UnsupportedArchitecture(
                f"its queries, keys and values have the shapes {tuple(query.shape)}, {tuple(key.shape)} and "
                f"{tuple(value.shape)}; keys and values must be alike, with the head size of the queries"
            )
        sinks = extra.get("s_aux")
        if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
            raise UnsupportedArchitecture(
                f"its attention sinks have the shape {tuple(sinks.shape)}; one number per head is what the engine has"
            )
        facts.append(
            LayerAttention(
                layer=int(layer.layer_idx),  # type: ignore[arg-type]  # modules' attributes are untyped
                heads=query.shape[1],
                kv_heads=key.shape[1],
                head_dim=key.shape[3],
                window=sliding_window,
                softcap=extra.get("softcap"),
                sinks=sinks is not None,
                scaling=scaling if scaling is not None else key.shape[3] ** -0.5,
            )
        )
        return query.transpose(1, 2).contiguous()

    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    positions = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    rows = torch.zeros(2, dtype=torch.long, device="meta")
    try:
        _set_experts(module, _PROBED_EXPERTS)
        with attending(attend), torch.inference_mode(), _Watch(positions) as watch:
            module(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{type(module).__name__} cannot be served: {error}") from error
    except Exception as error:  # foreign code: whatever it raises means that it does not fit
        raise UnsupportedArchitecture(
            f"{type(module).__name__} cannot run over the engine's attention, or does what depends on the numbers "
            f"that it computes with: {_brief(error)}"
        ) from error
    if not watch.used:
        raise UnsupportedArchitecture(
            f"{type(module).__name__} takes no positions from outside, so that a batch cannot have several sequences"
        )
    return facts


class _Watch(TorchFunctionMode):
    """Notes whether a tensor is used for anything."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.used |= any(value is self._tensor for value in (*args, *kwargs.values()))
        return func(*args, **kwargs)


def _set_experts(module: PreTrainedModel, implementation: str) -> None:
    if module._can_set_experts_implementation():
        module.set_experts_implementation(implementation)


def _check_windows(module: PreTrainedModel, windows: list[int | None]) -> None:
    """A sliding window that only the mask knew of would be lost, for the engine has transformers build no mask."""
    config = module.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types:
        expected = [kind == "sliding_attention" for kind in types]
    else:
        expected = [bool(getattr(config, "sliding_window", None))] * len(windows)
    lost = [layer for layer, window in enumerate(windows) if expected[layer] and window is None]
    if lost:
        raise UnsupportedArchitecture(
            f"{type(module).__name__} does not tell its attention function of the sliding window of layers {lost}"
        )


def _fill_buffers(module: PreTrainedModel) -> None:
    """Computes the buffers that no checkpoint holds (rotary frequencies), as transformers' own loading does."""
    names = [name for name, _ in module.named_non_persistent_buffers()]
    owners: dict[int, tuple[torch.nn.Module, PreTrainedModel]] = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        buffer = getattr(owner, attribute)
        unset = math.nan if buffer.is_floating_point() else -1
        setattr(owner, attribute, torch.full_like(buffer, unset, device="cpu"))
        owners[id(owner)] = owner, _model_around(module, path)
    with torch.no_grad():
        for owner, model in owners.values():
            model._init_weights(owner)
    for name in names:
        buffer = module.get_buffer(name)
        if bool((buffer.isnan() if buffer.is_floating_point() else buffer < 0).any()):
            raise UnsupportedArchitecture(f"{type(module).__name__} does not say how its buffer {name} is computed")


def _model_around(module: PreTrainedModel, path: str) -> PreTrainedModel:
    """The innermost model that contains a module: the one whose `_init_weights` knows it."""
    innermost = module
    parts = path.split(".") if path else []
    for length in range(1, len(parts) + 1):
        inner = module.get_submodule(".".join(parts[:length]))
        if isinstance(inner, PreTrainedModel):
            innermost = inner
    return innermost


def _bind(module: PreTrainedModel, layout: ImageLayout, weights: WeightRange) -> None:
    bound: dict[str, torch.nn.Parameter] = {}  # tied tensors stay one object
    for name, tensor in module.state_dict(keep_vars=True).items():
        place = layout.place(name)
        if place.shape != tuple(tensor.shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but its place has {place.shape}")
        if place.name not in bound:
            view = weights.tensor(place.dtype, place.shape, place.offset)
            bound[place.name] = torch.nn.Parameter(view, requires_grad=False)
        path, _, attribute = name.rpartition(".")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        setattr(module.get_submodule(path), attribute, bound[place.name] if is_parameter else bound[place.name].data)
    device = next(iter(bound.values())).device
    for name, buffer in list(module.named_non_persistent_buffers()):
        path, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(path), attribute, buffer.to(device))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"

"""A decoder bound to the tensors of its state: everything that a native call needs, laid out once, so that a step costs
little more than the call itself."""

import ctypes
from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unspool_kernels.logit_rows import LogitRows, logit_rows
from unspool_kernels.native.decoder_state import check_state
from unspool_kernels.native.decoder_weights import (
    ACTIVATIONS,
    FEATURE_MAPS,
    GATES,
    JOINS,
    DecoderWeights,
    LayerMixer,
    LayerWeights,
)
from unspool_kernels.native.library import Arguments, address, call, num_threads
from unspool_kernels.native.packed import MatrixArgument, padded

_MATRIX = MatrixArgument()


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("qkv", MatrixArgument),
        ("qkv_bias", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("out", MatrixArgument),
        ("out_bias", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("gate_up", MatrixArgument),
        ("gate_up_bias", ctypes.c_void_p),
        ("down", MatrixArgument),
        ("down_bias", ctypes.c_void_p),
        ("query_map", MatrixArgument),
        ("key_map", MatrixArgument),
        ("gate_weight", ctypes.c_void_p),
        ("gate_bias", ctypes.c_void_p),
        ("far_bias", ctypes.c_void_p),
        ("bank_weight", ctypes.c_void_p),
        ("bank_aging", ctypes.c_void_p),
        ("near_keys", ctypes.c_void_p),
        ("near_values", ctypes.c_void_p),
        ("bank_scores", ctypes.c_void_p),
        ("bank_positions", ctypes.c_void_p),
        ("far", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "join",
                "gate",
                "feature_map",
                "window",
                "sinks",
                "bank",
                "state_per_query_head",
                "state_rope",
                "near_row_max",
                "features",
                "inverse_rotation",
            )
        ),
        ("gate_normalizer", ctypes.c_double),
        ("mix", ctypes.c_double),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("embedding", MatrixArgument),
        ("head", MatrixArgument),
        ("final_norm", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("windows", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_windows",
                "num_layers",
                "hidden",
                "intermediate",
                "heads",
                "kv_heads",
                "head_dim",
                "vocabulary",
                "activation",
                "state_format",
                "position_limit",
            )
        ),
        ("rotary_scaling", ctypes.c_double),
        ("norm_eps", ctypes.c_double),
    ]


class _Decode(Arguments):
    function = "decode"
    _fields_ = [
        ("model", ctypes.POINTER(_Model)),
        *(
            (name, ctypes.c_void_p)
            for name in ("tokens", "starts", "slots", "positions", "logit_tokens", "logits", "workspace")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("sequences", "num_logits", "logits_stride", "workspace_bytes", "record_bytes")
        ),
    ]


class _Workspace(_Decode):
    function = "decode_workspace"


class DecoderProgram:
    """Runs tokens through a decoder whose state lies in these tensors. Not thread-safe: it owns one workspace."""

    def __init__(self, weights: DecoderWeights, state: Sequence[Mapping[str, Tensor]]) -> None:
        """`state` has one mapping a layer: near_keys, near_values, far and a bank's, as `unspool.state` lays them out,
        float32 or float16, which stay where they are. Raises ValueError for tensors that do not fit."""
        self._weights = weights
        self._state = [dict(layer) for layer in state]
        self._windows = torch.tensor(sorted({mixer.window for _, mixer in weights.layers}))
        self._num_slots = state[0]["near_keys"].shape[0]
        self._model = self._describe(self._describe_layers(), state[0]["near_keys"].dtype)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._workspace_for = (0, 0)  # tokens and threads that it is large enough for

    def logits(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        positions: Sequence[int],
        *,
        want: LogitRows | Sequence[LogitRows] = "last",
        threads: int | None = None,
    ) -> Tensor:
        """Consumes each sequence's tokens, which begin at its position, and advances its slot of the state.

        Returns float32 logits [rows, vocabulary]. Raises ValueError for more tokens of a sequence than the smallest
        window, for unknown ids, and for slots out of range or named twice.
        """
        self._check(tokens, slots, positions)
        threads = num_threads(threads)
        flat = array("i", [token for sequence in tokens for token in sequence])
        starts = array("i", [0])
        for sequence in tokens:
            starts.append(starts[-1] + len(sequence))
        rows = array("i", logit_rows([len(sequence) for sequence in tokens], want))
        slot_index, position = array("i", slots), array("q", positions)
        logits = torch.empty(len(rows), padded(self._weights.head.rows))
        arguments = _Decode(
            model=ctypes.pointer(self._model),
            tokens=flat.buffer_info()[0],
            starts=starts.buffer_info()[0],
            slots=slot_index.buffer_info()[0],
            positions=position.buffer_info()[0],
            logit_tokens=rows.buffer_info()[0],
            logits=address(logits),
            sequences=len(slots),
            num_logits=len(rows),
            logits_stride=logits.shape[1],
            record_bytes=ctypes.sizeof(_Model) + ctypes.sizeof(_Layer),
        )
        self._reserve(arguments, len(flat), threads)
        call(arguments, threads)
        return logits[:, : self._weights.head.rows]

    def _reserve(self, arguments: _Decode, tokens: int, threads: int) -> None:
        """Gives the call a workspace: what was enough for more tokens and threads is enough for fewer."""
        if tokens > self._workspace_for[0] or threads > self._workspace_for[1]:
            question = _Workspace.from_buffer_copy(arguments)
            call(question, threads)
            self._workspace_for = tokens, threads
            if self._workspace.numel() < question.workspace_bytes:
                self._workspace = torch.empty(question.workspace_bytes, dtype=torch.uint8)
        arguments.workspace = address(self._workspace)
        arguments.workspace_bytes = self._workspace.numel()

    def _check(self, tokens: Sequence[Sequence[int]], slots: Sequence[int], positions: Sequence[int]) -> None:
        if not len(tokens) == len(slots) == len(positions):
            raise ValueError("tokens, slots and positions must name the same sequences")
        if len(set(slots)) != len(slots) or not all(0 <= slot < self._num_slots for slot in slots):
            raise ValueError(f"slots: must be different and between 0 and {self._num_slots - 1}")
        window, vocabulary = self._weights.window, self._weights.head.rows
        for sequence in tokens:
            if not 1 <= len(sequence) <= window:
                raise ValueError(f"tokens: a sequence brings between 1 and {window} tokens a call")
            if min(sequence) < 0 or max(sequence) >= vocabulary:
                raise ValueError(f"tokens: ids must be between 0 and {vocabulary - 1}")
        if not tokens:
            raise ValueError("tokens: there must be at least one sequence")
        if not all(position >= 0 for position in positions):
            raise ValueError("positions: must not be negative")

    def _describe_layers(self) -> "ctypes.Array[_Layer]":
        records = (_Layer * len(self._weights.layers))()
        for index, ((weights, mixer), tensors) in enumerate(zip(self._weights.layers, self._state, strict=True)):
            check_state(self._weights, mixer, tensors, like=self._state[0]["near_keys"])
            records[index] = self._describe_layer(weights, mixer, tensors)
        return records

    def _describe_layer(self, weights: LayerWeights, mixer: LayerMixer, tensors: Mapping[str, Tensor]) -> _Layer:
        return _Layer(
            input_norm=address(weights.input_norm),
            qkv=weights.qkv.argument,
            qkv_bias=address(weights.qkv_bias),
            q_norm=address(weights.q_norm),
            k_norm=address(weights.k_norm),
            out=weights.out.argument,
            out_bias=address(weights.out_bias),
            post_norm=address(weights.post_norm),
            gate_up=weights.gate_up.argument,
            gate_up_bias=address(weights.gate_up_bias),
            down=weights.down.argument,
            down_bias=address(weights.down_bias),
            query_map=weights.far.query_map.argument if weights.far.query_map else _MATRIX,
            key_map=weights.far.key_map.argument if weights.far.key_map else _MATRIX,
            gate_weight=address(weights.far.gate_weight),
            gate_bias=address(weights.far.gate_bias),
            far_bias=address(weights.far.bias),
            bank_weight=address(weights.far.bank_weight),
            bank_aging=address(weights.far.bank_aging),
            near_keys=address(tensors["near_keys"]),
            near_values=address(tensors["near_values"]),
            bank_scores=address(tensors.get("bank_scores")),
            bank_positions=address(tensors.get("bank_positions")),
            far=address(tensors.get("far")),
            join=JOINS.index(mixer.join),
            gate=GATES.index(mixer.gate),
            feature_map=FEATURE_MAPS.index(mixer.feature_map),
            window=mixer.window,
            sinks=mixer.sinks,
            bank=mixer.bank,
            state_per_query_head=mixer.state_per_query_head,
            state_rope=mixer.state_rope,
            near_row_max=mixer.near_row_max,
            features=mixer.features,
            inverse_rotation=int(torch.searchsorted(self._windows, mixer.window)),
            gate_normalizer=mixer.gate_normalizer,
            mix=mixer.mix,
        )

    def _describe(self, layers: "ctypes.Array[_Layer]", state_dtype: torch.dtype) -> _Model:
        weights = self._weights
        return _Model(
            layers=layers,
            embedding=weights.embedding.argument,
            head=weights.head.argument,
            final_norm=address(weights.final_norm),
            frequencies=address(weights.frequencies),
            windows=address(self._windows),
            num_windows=len(self._windows),
            num_layers=len(layers),
            hidden=weights.embedding.columns,
            intermediate=weights.intermediate,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            head_dim=weights.head_dim,
            vocabulary=weights.head.rows,
            activation=ACTIVATIONS.index(weights.activation),
            state_format=0 if state_dtype == torch.float32 else 2,
            position_limit=weights.position_limit,
            rotary_scaling=weights.rotary_scaling,
            norm_eps=weights.norm_eps,
        )

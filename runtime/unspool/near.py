"""The near part of a mixer: softmax over sinks, window and bank, and the tokens that leave it for the state."""

from typing import NamedTuple

import torch
from torch import Tensor

from unspool.bank import BankPriority, entries_of, no_entries, reach, rows_filled, unrotate
from unspool.batch import StepContext
from unspool.mixer_spec import MixerSpec
from unspool.state import LayerState
from unspool_kernels.reference import bank, ring_window
from unspool_kernels.reference.merge import merge


class RotatedHeads(NamedTuple):
    """Rotated q and sink_q, the query as the sinks see it, [B, T, H_kv, G, D]; rotated k, and v, [B, T, H_kv, D]."""

    q: Tensor
    sink_q: Tensor
    k: Tensor
    v: Tensor


class NearPart(NamedTuple):
    """The near set's attention, and what left it at each token: rotated keys and values [B, T, H_kv, D], positions
    [B, T] or, out of a bank, [B, T, H_kv], and a mask [B, T]. Junk where the mask is not set."""

    output: ring_window.NearOutput
    left_keys: Tensor
    left_values: Tensor
    left_positions: Tensor
    left: Tensor


class _Left(NamedTuple):
    """The last four fields of `NearPart`."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    mask: Tensor


def attend(
    heads: RotatedHeads, spec: MixerSpec, priority: BankPriority | None, context: StepContext, state: LayerState | None
) -> NearPart:
    """Attends and, when there is a state, writes the tokens into it. `priority` where the spec has a bank."""
    if state is not None and context.is_step:
        return _step(heads, spec, priority, context, state)
    return _chunk(heads, spec, priority, context, state)


def unrotated_left_keys(near: NearPart, spec: MixerSpec, context: StepContext) -> Tensor:
    if spec.has_state and spec.bank:
        return unrotate(near.left_keys, near.left_positions, context.rotary)
    return context.unrotate_leaving(spec.window).apply(near.left_keys)


def _step(
    heads: RotatedHeads, spec: MixerSpec, priority: BankPriority | None, context: StepContext, state: LayerState
) -> NearPart:
    assert context.rows is not None
    keys, values = context.rows.read(state["near_keys"]), context.rows.read(state["near_values"])
    position = context.positions[:, 0]
    row = ring_window.row_of(position, spec.window, spec.sinks)
    sequence = torch.arange(row.shape[0], device=row.device)
    leaving = _left_window(keys[sequence, :, row][:, None], values[sequence, :, row][:, None], spec, context)
    if priority is not None:
        scores, positions = context.rows.read(state["bank_scores"]), context.rows.read(state["bank_positions"])
        entries = entries_of(keys, values, spec, scores, positions)
        offered = _offer(leaving, priority, spec, context)
        filled = rows_filled(position, spec)
        evicted = bank.step(entries, offered, priority.aging, filled, reach(context.rotary), spec.window)
        context.rows.write(state["bank_scores"], scores)
        context.rows.write(state["bank_positions"], positions)
        leaving = _left(evicted, spec, context)
    keys[sequence, :, row] = heads.k[:, 0].to(keys.dtype)
    values[sequence, :, row] = heads.v[:, 0].to(values.dtype)
    output = ring_window.step(heads.q[:, 0], heads.sink_q[:, 0], keys, values, position, spec.sinks)
    context.rows.write(state["near_keys"], keys)
    context.rows.write(state["near_values"], values)
    return NearPart(output, *leaving)


def _chunk(
    heads: RotatedHeads,
    spec: MixerSpec,
    priority: BankPriority | None,
    context: StepContext,
    state: LayerState | None,
) -> NearPart:
    window, sinks, tokens = spec.window, spec.sinks, heads.k.shape[1]
    if state is None:
        past = ring_window.empty_history(heads.k, window, sinks)
    else:
        assert context.rows is not None
        keys, values = context.rows.read(state["near_keys"]), context.rows.read(state["near_values"])
        past = ring_window.read_history(keys, values, context.start, window, sinks)
    history = ring_window.with_new_sinks(past, heads.k, heads.v, context.start, context.length)
    output = ring_window.chunk(heads.q, heads.sink_q, heads.k, heads.v, history, context.start)
    left_keys = torch.cat([past.keys.transpose(1, 2), heads.k], dim=1)[:, :tokens]
    left_values = torch.cat([past.values.transpose(1, 2), heads.v], dim=1)[:, :tokens]
    leaving = _left_window(left_keys, left_values, spec, context)
    stored = None
    if priority is not None:
        if state is not None and context.rows is not None:
            scores, positions = context.rows.read(state["bank_scores"]), context.rows.read(state["bank_positions"])
            stored = entries_of(keys, values, spec, scores, positions)
        banked, leaving = _bank_chunk(heads.q, leaving, spec, priority, context, stored)
        output = _join(output, banked)
    if state is not None and context.rows is not None:
        near = sinks + window
        ring_window.write(
            keys[:, :, :near], values[:, :, :near], heads.k, heads.v, context.start, context.length, sinks
        )
        context.rows.write(state["near_keys"], keys)
        context.rows.write(state["near_values"], values)
        if stored is not None:
            context.rows.write(state["bank_scores"], stored.scores)
            context.rows.write(state["bank_positions"], stored.positions)
    return NearPart(output, *leaving)


def _bank_chunk(
    q: Tensor,
    leaving: _Left,
    spec: MixerSpec,
    priority: BankPriority,
    context: StepContext,
    stored: bank.Entries | None,
) -> tuple[ring_window.NearOutput, _Left]:
    """The bank's share of the near set, and what falls out of it; advances `stored` in place, if given."""
    offered = _offer(leaving, priority, spec, context)
    entries = stored if stored is not None else no_entries(leaving.keys, spec)
    filled = rows_filled(context.start, spec)
    decided = bank.plan(entries, offered, priority.aging, filled, reach(context.rotary), spec.window)
    output, evicted = bank.chunk(q, entries, offered, decided)
    if stored is not None:
        bank.write(stored, offered, decided)
    return output, _left(evicted, spec, context)


def _left_window(keys: Tensor, values: Tensor, spec: MixerSpec, context: StepContext) -> _Left:
    positions = context.positions - spec.window
    return _Left(keys, values, positions, context.valid & (positions >= spec.sinks))


def _left(evicted: bank.Evicted, spec: MixerSpec, context: StepContext) -> _Left:
    """A token is evicted for every one that leaves the window once the bank is full."""
    full = context.positions >= spec.near_tokens
    return _Left(*evicted, context.valid & full)


def _offer(leaving: _Left, priority: BankPriority, spec: MixerSpec, context: StepContext) -> bank.Leaving:
    keys = context.unrotate_leaving(spec.window).apply(leaving.keys)
    scores = priority.score(keys, leaving.values.to(keys.dtype))
    return bank.Leaving(leaving.keys, leaving.values, scores, leaving.positions, leaving.mask)


def _join(near: ring_window.NearOutput, banked: ring_window.NearOutput) -> ring_window.NearOutput:
    return ring_window.NearOutput(
        merge(near.values, near.log_mass, banked.values, banked.log_mass),
        torch.logaddexp(near.log_mass, banked.log_mass),
        torch.maximum(near.row_max, banked.row_max),
    )

"""The token protocol: what the model reads as text, and which of it is trained.

::

    reason:  [BOS] <prefix>; State: <s0 s1 ...> [END_OF_PREFIX] | [BEGIN_OF_REASONING] <text> [EOS]
    act:     [BOS] <prefix>; State: <s0 s1 ...> [END_OF_PREFIX] | [BEGIN_OF_ACTION]

Left of the bar is the prefix (bidirectional, ``ar_mask`` False), right of it the suffix (causal, True). Training and
inference build their prompts here, so they cannot drift apart. Source: DESIGN section 4 ("Token protocol").
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from fusevla.data.annotations import Kind
from fusevla.tokens.ids import ProtocolIds, protocol_ids
from fusevla.tokens.tokenizer import Tokenizer

__all__ = [
    "Kind",
    "ProtocolIds",
    "TokenizedText",
    "digitize_state",
    "encode_prompt",
    "encode_sample",
    "format_prompt",
    "protocol_ids",
]

STATE_BINS = 256
_LEFT_EDGES = np.linspace(-1.0, 1.0, STATE_BINS + 1)[:-1]


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """One sample's text, not yet padded; ``l`` is its own length."""

    tokens: Int[np.ndarray, " l"]
    mask: Bool[np.ndarray, " l"]
    """All True: padding is the collation's business."""
    ar_mask: Bool[np.ndarray, " l"]
    """True in the suffix, where every token starts a new causal block."""
    loss_mask: Bool[np.ndarray, " l"]
    """True where the token is a target of the text loss."""
    diffusion: bool
    """Whether the sample's actions are trained."""
    truncated: int = 0
    """Tokens that the prefix lost to fit; END_OF_PREFIX, the state and the suffix never lose any."""
    clipped: int = 0
    """State dimensions outside [-1, 1]."""


def digitize_state(state: Float[np.ndarray, " a"]) -> tuple[Int[np.ndarray, " a"], int]:
    """256 equal bins over [-1, 1]: (bins in 0..255, how many dimensions lay outside and were clipped).

    Args:
        state: The *normalised* state, before any zero-padding.

    Raises:
        ValueError: NaN or infinity, for which no bin is right.
    """
    values = np.asarray(state, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"state: expected finite values, got {values.tolist()}; check the column and its statistics")
    bins = np.clip(np.digitize(values, _LEFT_EDGES) - 1, 0, STATE_BINS - 1)
    return bins, int(np.count_nonzero(np.abs(values) > 1.0))


def format_prompt(prefix: str, state_bins: Int[np.ndarray, " a"]) -> str:
    """The one string that is encoded as the prefix: the text exactly as annotated, then the state in decimal."""
    return f"{prefix}; State: {' '.join(str(int(b)) for b in state_bins)}"


def encode_sample(
    tokenizer: Tokenizer,
    prefix: str,
    state_bins: Int[np.ndarray, " a"],
    target: str | None,
    kind: Kind,
    max_len: int,
    supervise_act_decision: bool = True,
) -> TokenizedText:
    """Tokens and masks of a training sample.

    Args:
        tokenizer: The tokenizer whose protocol ids the model knows.
        prefix: The prompt's text, untouched (no stripping).
        state_bins: From ``digitize_state``.
        target: The thought to write; None exactly where ``kind`` acts.
        kind: What the sample teaches; ``*_outdated`` marks a thought that no longer fits the frame.
        max_len: Upper bound of the tokens; a prefix that is too long loses its middle.
        supervise_act_decision: Train the decision "act now" of ``act`` samples.

    Raises:
        ValueError: a target where none belongs (or none where one does), an unknown kind, or a suffix and state that exceed
            ``max_len`` even without any prefix text.
    """
    suffix, supervised = _suffix(tokenizer, target, kind, supervise_act_decision)
    return _assemble(tokenizer, prefix, state_bins, suffix, supervised, max_len, diffusion=target is None)


def encode_prompt(tokenizer: Tokenizer, prefix: str, state: Float[np.ndarray, " a"], max_len: int) -> TokenizedText:
    """The prompt at inference: the same prefix as in training, up to END_OF_PREFIX, with no suffix.

    ``state`` is normalised and not padded; what was outside [-1, 1] is counted in ``clipped``. ``max_len`` bounds the prompt
    alone. Raises ``ValueError`` as ``digitize_state`` and ``encode_sample`` do.
    """
    bins, clipped = digitize_state(state)
    text = _assemble(tokenizer, prefix, bins, [], [], max_len, diffusion=False)
    return dataclasses.replace(text, clipped=clipped)


def _suffix(tokenizer: Tokenizer, target: str | None, kind: Kind, supervise_act: bool) -> tuple[list[int], list[bool]]:
    """The suffix's ids and which of them are targets (the table of the module's source)."""
    ids = tokenizer.ids
    if kind not in ("reason", "reason_outdated", "act", "act_outdated"):
        raise ValueError(f"kind: expected reason, reason_outdated, act or act_outdated, got {kind!r}")
    if (target is not None) != kind.startswith("reason"):
        raise ValueError(f"target: expected a text where the sample reasons, None where it acts, got {target!r} for {kind}")
    if target is None:
        return [ids.boa], [kind == "act" and supervise_act]
    text = tokenizer.encode(target, eos=True)
    # An outdated prompt teaches *that* a thought is due; its text was written for another frame.
    return [ids.bor, *text], [True, *[kind == "reason"] * len(text)]


def _assemble(
    tokenizer: Tokenizer,
    prefix: str,
    state_bins: Int[np.ndarray, " a"],
    suffix: list[int],
    supervised: list[bool],
    max_len: int,
    diffusion: bool,
) -> TokenizedText:
    head, truncated = _fit_prefix(tokenizer, prefix, state_bins, max_len - len(suffix) - 1, len(suffix))
    tokens = [*head, tokenizer.ids.eop, *suffix]
    return TokenizedText(
        tokens=np.asarray(tokens, dtype=np.int32),
        mask=np.ones(len(tokens), dtype=bool),
        ar_mask=np.arange(len(tokens)) > len(head),
        loss_mask=np.asarray([False] * (len(head) + 1) + supervised, dtype=bool),
        diffusion=diffusion,
        truncated=truncated,
    )


def _fit_prefix(
    tokenizer: Tokenizer, prefix: str, state_bins: Int[np.ndarray, " a"], limit: int, suffix_length: int
) -> tuple[list[int], int]:
    """[BOS] and the prompt in at most ``limit`` tokens: (ids, how many tokens the prefix text lost)."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(format_prompt(text, state_bins), bos=True)

    full = encode(prefix)
    if len(full) <= limit:
        return full, 0
    if len(encode("")) > limit:
        raise ValueError(
            f"text: expected max_token_len >= {len(encode('')) + suffix_length + 1} for the state, END_OF_PREFIX and a suffix of "
            f"{suffix_length} tokens without any prefix text, got {limit + suffix_length + 1}; raise max_token_len"
        )
    low, high = 0, len(prefix)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode(_without_middle(prefix, middle))) <= limit else (low, middle - 1)
    kept = encode(_without_middle(prefix, low))
    return kept, len(full) - len(kept)


def _without_middle(text: str, keep: int) -> str:
    """``keep`` characters of ``text``: the instruction opens a prefix and the current sub-goal closes it, so the middle goes."""
    return text[: (keep + 1) // 2] + text[len(text) - keep // 2 :]

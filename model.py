"""
The whole model: a GPT in which groups of blocks may be applied several times with the same weights.

    forward:  embed -> stages -> readout             a stage is one block, or a looped group of blocks
    group:    for i in range(n): s = step(s, e, i)   e: what enters the group, s: the state, i: the loop
    step:     s = norm(blocks(inject(s, e) + index(i)))

Prelude, core and coda are the stages before, in and after the loop. From top to bottom: the config, the parts of a
block, the parts of a loop, the GPT. The config is read in __init__ alone; "off" is a module that does nothing.
Shapes: B batch, T time (tokens), C channels (n_embd), H heads, D head size (C / H), V vocabulary.
"""

import math
from collections import deque
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

LEAST = dict.fromkeys(
    "block_size vocab_size n_layer n_head n_embd n_loop max_loops max_shift n_ahead".split(), 1
)
LEAST |= dict.fromkeys(("mlp_scale", "rope_base", "embedding_scale", "label_shift_prob"), 1e-9)
LEAST |= {"document_separator": -1}  # the least value of a number, where it is not 0


@dataclass
class GPTConfig:
    """Every choice about the model. Raises ValueError with the field, its value and what is allowed."""

    block_size: int = 1024  # longest context in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12  # blocks of a plain GPT or under loop_groups; not read when n_block is set
    n_head: int = 12
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # 0 for pretraining, try 0.1 and more for small data
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has it; False is a bit faster
    norm: str = "layernorm"  # layernorm, rmsnorm, weightless (RMSNorm without a gain)
    position: str = "learned"  # learned, rope, none
    attention: str = "mha"  # mha, mla (keys and values from one latent, arXiv 2405.04434)
    mlp: str = "gelu"  # gelu, gelu_tanh, relu2, swiglu
    # their details; 0 for the usual
    n_kv_head: int = 0  # heads of keys and values, each shared by several of queries; 0: n_head
    head_size: int = 0  # 0: n_embd / n_head
    n_latent: int = 0  # width of mla's latent; 0: n_embd / 2
    n_hidden: int = 0  # width inside the MLP; 0: 4 n_embd
    mlp_scale: float = 1.0  # of the activations (Parcae: 0.5)
    qk_norm: str = "none"  # none, head (of each: Qwen3), width (of all: OLMo-2), rotated (each after rope: Parcae)
    qk_bias: bool = False  # learned bias of queries and keys (Huginn)
    value_embedding: bool = (
        False  # every other block adds a gated embedding of the token to its values (Parcae)
    )
    rope_base: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3's: factor, low and high frequency factor, original context
    norm_place: str = "pre"  # pre, post (of the branch: OLMo-2), branch (both: Ouro), sum (pre and of the sum: Huginn)
    norm_eps: float = 0.0  # 0: 1e-5 in LayerNorm, machine epsilon in RMSNorm
    embedding_scale: float = 1.0  # Huginn: sqrt(n_embd)
    embedding_norm: bool = False  # a norm after the embedding
    final_norm: bool = True  # ln_f; off where the loop's own norm is the last (Ouro)
    tie_weights: bool = True  # the head is the embedding
    logit_softcap: float = 0.0  # cap * tanh(logits / cap); 0: off
    init: str = "gpt2"  # gpt2, small (outputs by effective depth: Huginn), orthogonal (outputs zero: Parcae)
    document_separator: int = (
        -1
    )  # token id that ends a document, beyond which attention does not look; -1: none
    # what is looped
    n_prelude: int = 0  # blocks before the core
    n_block: int = 0  # blocks of the core, looped together; 0: a plain GPT or loop_groups
    n_coda: int = 0  # blocks after the core
    n_loop: int = 1  # loops of every group; with sampled depth their mean
    loop_groups: tuple = ()  # any looping over n_layer blocks: [[0,1],[3]] loops 0-1 together and 3 alone
    loop_counts: tuple = ()  # in place of n_loop, one count per group
    max_loops: int = 64  # bound of sampled depth, rows of the learned loop embedding
    use_model_baseline: bool = False  # the control: the same blocks with nothing looped
    # how it is looped
    input_injection: str = (
        "inject"  # passthrough, add, inject, diagonal, residual: how the input comes in
    )
    residual_share: float = (
        0.1  # what input_injection=residual adds of the group's input after each loop
    )
    state_init: str = "input"  # input, zero, noise: the state before the first loop
    loop_noise_scale: float = (
        0.0  # training noise before the first loop, in units of sqrt(2 / (5 n_embd))
    )
    loop_norm: str = "rmsnorm"  # none, rmsnorm: norm of the state after each loop
    loop_embedding: str = "none"  # none, learned, sinusoidal: tells the blocks which loop it is
    loop_entry: str = "none"  # none, rmsnorm: norm of the group's input (Parcae)
    loop_exit: str = (
        "none"  # none, linear (Parcae), final_norm (ln_f once more: Huginn): after the last loop
    )
    exit_gate: str = (
        "none"  # none, state (Ouro), mean_state (of the tokens so far): learns when to stop looping
    )
    loop_sampling: str = "fixed"  # fixed, uniform, geometric, poisson: loops of a training step
    bptt_k: int = 0  # gradient through the last k loops only; 0: through all
    # what it predicts
    predict_ahead: bool = (
        False  # how far ahead is drawn for each sequence, and told by a token before the input
    )
    max_shift: int = 4  # farthest
    label_shift_prob: float = (
        0.5  # chance of stopping at the next token, else at the one after it, and so on
    )
    n_ahead: int = 1  # heads, each for a token further ahead (arXiv 2404.19737)

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            kinds = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
            fits = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
            self._require(field.name, fits, f"of type {kind.__name__}")
        for name, table in TABLES.items():
            self._require(name, getattr(self, name) in table, "one of " + ", ".join(table))
        self._check_shape()
        self._check_loops()

    def _require(self, name, ok, allowed):
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

    def _check_shape(self):
        for name in (field.name for field in fields(self) if field.type in (int, float)):
            least = LEAST.get(name, 0)
            self._require(
                name, least <= getattr(self, name) < math.inf, f"finite and at least {least}"
            )
        self._require(
            "document_separator", self.document_separator < self.vocab_size, "-1 or a token id"
        )
        self._require("dropout", self.dropout < 1, "at least 0 and less than 1")
        self._require("label_shift_prob", self.label_shift_prob <= 1, "more than 0 and at most 1")
        alone = self.document_separator < 0 and not self.value_embedding or not self.predict_ahead
        self._require(
            "predict_ahead",
            alone,
            "False with document_separator, value_embedding: its token has no id",
        )
        self._require(
            "n_embd",
            self.head_size or self.n_embd % self.n_head == 0,
            f"a multiple of n_head={self.n_head}",
        )
        self._require(
            "n_kv_head",
            self.n_head % (self.n_kv_head or 1) == 0,
            f"0 or a divisor of n_head={self.n_head}",
        )
        mha = self.attention == "mha"
        self._require(
            "attention",
            mha
            or (self.n_kv_head, self.qk_norm, self.qk_bias, self.value_embedding)
            == (0, "none", False, False),
            "mha with n_kv_head, qk_norm, qk_bias or value_embedding",
        )
        even = self.position != "rope" or self.size % (2 if mha else 4) == 0
        self._require("position", even, f"another one with heads of {self.size} channels")
        self._require(
            "n_embd",
            self.n_embd % 2 == 0 or self.loop_embedding != "sinusoidal",
            "even for sinusoids",
        )
        self._require(
            "rope_scaling",
            len(self.rope_scaling) in (0, 4),
            "() or factor, low, high, original context",
        )

    def _check_loops(self):
        looped = bool(self.n_block or self.loop_groups)
        self._require(
            "n_block",
            self.n_block or not self.n_prelude + self.n_coda,
            "at least 1 with a prelude or coda",
        )
        self._require(
            "loop_groups",
            not (self.n_block and self.loop_groups),
            "() when n_block says what is looped",
        )
        groups = [
            list(group) if isinstance(group, (tuple, list)) else [] for group in self.loop_groups
        ]
        flat = [block for group in groups for block in group]
        known = all(type(block) is int for block in flat) and flat == sorted(
            {*flat} & {*range(self.n_layer)}
        )
        fits = known and all(group and group[-1] - group[0] == len(group) - 1 for group in groups)
        self._require(
            "loop_groups",
            fits,
            f"ascending runs of blocks below n_layer={self.n_layer}, as [[0,1],[3]]",
        )
        n_groups = len(self.loop_groups) or int(looped)
        self._require(
            "loop_counts",
            len(self.loop_counts) in (0, n_groups),
            f"() or one count for each of {n_groups}",
        )
        bounded = all(type(n) is int and 1 <= n <= self.max_loops for n in self.loop_counts)
        self._require("loop_counts", bounded, f"counts from 1 to max_loops={self.max_loops}")
        most, why = (
            (self.max_loops, "max_loops")
            if looped and not self.loop_counts
            else (1, "no loop, or loop_counts")
        )
        self._require("n_loop", self.n_loop <= most, f"at most {most} ({why})")
        self._require(
            "exit_gate", looped or self.exit_gate == "none", "none where nothing is looped"
        )
        seen = self.input_injection != "passthrough" or (
            self.state_init == "input" and not self.bptt_k
        )
        self._require(
            "input_injection",
            seen,
            "another one with this state_init or bptt_k: else no gradient gets out",
        )

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def n_position(self) -> int:
        """Positions: those of the tokens, and of the token before them if there is one."""
        return self.block_size + self.predict_ahead

    @property
    def n_effective(self) -> int:
        """Blocks that a token passes, each counted as often."""
        return self.n_physical + sum(
            (n - 1) * len(group) for n, group in zip(self.counts(), self.groups)
        )

    @property
    def n_physical(self) -> int:
        """Blocks that the model holds, each counted once."""
        return self.n_prelude + self.n_block + self.n_coda if self.n_block else self.n_layer

    @property
    def groups(self) -> tuple:
        """The looped groups of blocks, whichever way they were spelt: ((0, 1), (3,))."""
        core = (
            [range(self.n_prelude, self.n_prelude + self.n_block)]
            if self.n_block
            else self.loop_groups
        )
        return () if self.use_model_baseline else tuple(map(tuple, core))

    @property
    def stages(self) -> tuple:
        """The forward pass in order: ((blocks, looped), ...)."""
        inside = {block for group in self.groups for block in group}
        alone = [((block,), False) for block in range(self.n_physical) if block not in inside]
        return tuple(sorted(alone + [(group, True) for group in self.groups]))

    def counts(self, n_loop=None) -> tuple:
        """Loops of each group. n_loop: None (the config's), an int for every group or one per group."""
        if n_loop is None:
            n_loop = self.loop_counts if self.loop_counts and self.groups else self.n_loop
        each = isinstance(n_loop, (tuple, list))
        counts = tuple(n_loop) if each else (n_loop,)
        if not all(type(n) is int and n >= 1 for n in counts) or (
            each and len(counts) != len(self.groups)
        ):
            raise ValueError(
                f"n_loop={n_loop!r}: must be an int >= 1, or one for each of {len(self.groups)} groups"
            )
        return counts if each else counts * len(self.groups)


# -----------------------------------------------------------------------------
# the parts of a block: x (B, T, C) -> (B, T, C), told where the tokens stand


class Where(NamedTuple):
    position: (
        torch.Tensor
    )  # (T,), or (B, T) where rows differ, counted from the start of the document
    mask: torch.Tensor | None = (
        None  # (.., T, S), True where a token may look; None: at itself and all before it
    )
    turn: tuple | None = None  # of rotary positions: cos and sin (.., 1, T, D/2)
    idx: torch.Tensor | None = None  # (B, T), the tokens themselves
    cache: object = (
        None  # keys and values of S - T tokens before them: extend(k, v) -> k, v of all S
    )


def one_document(x, idx):
    """Position and mask where a window is one text."""
    return torch.arange(x.size(1), device=x.device), None


def documents(x, idx, separator):
    """Position and mask where a window holds texts, each ended by the separator, each read as if it stood alone."""
    if idx.is_floating_point():
        raise ValueError(
            "document_separator: documents are told apart in tokens, not in embeddings"
        )
    place = torch.arange(idx.size(1), device=idx.device).expand_as(idx)
    first = F.pad(idx == separator, (1, -1))  # (B, T): right after a separator
    start = torch.where(first, place, 0).cummax(1).values
    same = start[:, None, :, None] == start[:, None, None, :]  # (B, 1, T, T)
    return place - start, same.tril()


NORM = {
    "layernorm": lambda config: nn.LayerNorm(
        config.n_embd, config.norm_eps or 1e-5, bias=config.bias
    ),
    "rmsnorm": lambda config, width=0: nn.RMSNorm(width or config.n_embd, config.norm_eps or None),
    "weightless": lambda config: nn.RMSNorm(
        config.n_embd, config.norm_eps or None, elementwise_affine=False
    ),
}


class LearnedPosition(nn.Embedding):
    """One learned vector per position, added to the token embedding (GPT-2)."""

    def __init__(self, config):
        super().__init__(config.n_position, config.n_embd)

    def forward(self, x, where):
        return x + super().forward(where.position)


class RotaryTable(nn.Module):
    """Angles position * base^(-2i/D) as cos and sin, (.., 1, T, D/2) each (arXiv 2104.09864)."""

    def __init__(self, config):
        super().__init__()
        size = config.size // 2 if config.attention == "mla" else config.size
        frequencies = config.rope_base ** (-torch.arange(0, size, 2) / size)
        if (
            config.rope_scaling
        ):  # slow ones divided by factor, fast ones kept, blended between (Llama 3.1)
            factor, low, high, context = config.rope_scaling
            kept = ((context * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            frequencies = frequencies * (kept + (1 - kept) / factor)
        angles = torch.outer(torch.arange(config.n_position), frequencies)  # (n_position, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, position):
        return self.cos[position].unsqueeze(-3), self.sin[position].unsqueeze(-3)


def rotate(x, where):
    """Queries or keys x (B, H, T, D), channels i and i + D/2 turned by the angles of their position."""
    (cos, sin), (a, b) = where.turn, x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Keep(nn.Identity):
    """Off: x as it is."""

    def forward(self, x, *_):
        return x


POSITION = {  # what is added to the embedding, what turns queries and keys, what where.turn is of a position
    "learned": (LearnedPosition, Keep, lambda config: lambda position: None),
    "rope": (Keep, lambda config: rotate, RotaryTable),
    "none": (Keep, Keep, lambda config: lambda position: None),
}


class Bias(nn.Module):
    """A learned vector for all heads, x (B, T, H, D)."""

    def __init__(self, config, heads):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads * config.size))

    def forward(self, x):
        return x + self.bias.view(x.shape[-2:])


class WidthNorm(nn.RMSNorm):
    """RMSNorm over all heads together, x (B, T, H, D)."""

    def forward(self, x):
        return super().forward(x.flatten(-2)).view_as(x)


QK_NORM = {  # (config, heads) -> norm before the rotation, after it
    "none": (lambda config, heads: Keep(config), Keep),
    "head": (lambda config, heads: NORM["rmsnorm"](config, config.size), Keep),
    "width": (lambda config, heads: WidthNorm(heads * config.size, config.norm_eps or None), Keep),
    "rotated": (
        lambda config, heads: Keep(config),
        lambda config: nn.RMSNorm(config.size, elementwise_affine=False),
    ),
}


class ValueEmbedding(nn.Module):
    """Adds an embedding of the token to its values, times a gate per head, 2 sigmoid(Linear(x)) (Parcae)."""

    def __init__(self, config, heads):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, heads * config.size)
        self.gate = nn.Linear(min(32, config.n_embd), heads, bias=False)

    def forward(self, v, x, where):  # v (B, T, H, D), x (B, T, C)
        gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
        return v + gate.unsqueeze(-1) * self.table(where.idx).view_as(v)


class Attention(nn.Module):
    """Causal self-attention, of as many heads of keys and values as of queries or fewer (arXiv 2305.13245)."""

    def __init__(self, config, number=0):
        super().__init__()
        self.size, self.dropout = config.size, config.dropout
        self.heads = H, K, _ = (config.n_head, *2 * (config.n_kv_head or config.n_head,))
        self.c_attn = nn.Linear(
            config.n_embd, (H + 2 * K) * config.size, bias=config.bias
        )  # queries, keys and values
        self.c_proj = nn.Linear(H * config.size, config.n_embd, bias=config.bias)
        self.n_products = (
            2 * H * config.size
        )  # multiply-adds for each pair of tokens: scores, and values by them
        before, after = QK_NORM[config.qk_norm]
        self.q_norm, self.k_norm, self.qk_norm = before(config, H), before(config, K), after(config)
        self.q_bias, self.k_bias = (
            Bias(config, heads) if config.qk_bias else Keep(config) for heads in (H, K)
        )
        chosen = (
            number % 2 == (config.n_physical - 1) % 2
        )  # the last block and every other before it
        self.value = (
            ValueEmbedding(config, K) if config.value_embedding and chosen else Keep(config)
        )
        self.rotate = POSITION[config.position][1](config)

    def forward(self, x, where):
        q, k, v = (
            self.c_attn(x).unflatten(-1, (-1, self.size)).split(self.heads, dim=-2)
        )  # (B, T, H, D)
        q, k, v = self.q_norm(self.q_bias(q)), self.k_norm(self.k_bias(k)), self.value(v, x, where)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        q, k = (self.qk_norm(self.rotate(part, where)) for part in (q, k))
        if where.cache is not None:
            k, v = where.cache.extend(k, v)
        y = attend(q, k, v, where, self.dropout * self.training)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


def attend(q, k, v, where, dropout, scale=None):
    few, causal = k.size(1) != q.size(1), where.mask is None
    return F.scaled_dot_product_attention(
        q, k, v, where.mask, dropout, causal, scale=scale, enable_gqa=few
    )


class LatentAttention(nn.Module):
    """Keys and values of all heads from one latent per token (MLA: DeepSeek-V2, arXiv 2405.04434, section 2.1).
    With rotary positions each head has D/2 more channels that turn; those of the keys are shared by the heads. A cache
    holds latents and turned channels; queries then absorb the up-projection of the keys, outputs that of values."""

    def __init__(self, config, number=0):
        super().__init__()
        self.size, self.n_latent, self.dropout = (
            config.size,
            config.n_latent or config.n_embd // 2,
            config.dropout,
        )
        self.turning, C, H = (
            config.size // 2 * (config.position == "rope"),
            config.n_embd,
            config.n_head,
        )
        self.c_q = nn.Linear(C, H * (self.size + self.turning), bias=config.bias)
        self.c_latent = nn.Linear(C, self.n_latent + self.turning, bias=config.bias)
        self.ln_latent = NORM["rmsnorm"](config, self.n_latent)
        self.c_up = nn.Linear(self.n_latent, H * 2 * self.size, bias=False)  # keys, values
        self.c_proj = nn.Linear(H * self.size, C, bias=config.bias)
        self.n_products = H * (2 * self.size + self.turning)
        self.rotate = POSITION[config.position][1](config)

    def forward(self, x, where):
        q = (
            self.c_q(x).unflatten(-1, (-1, self.size + self.turning)).transpose(1, 2)
        )  # (B, H, T, D + turning)
        q, q_turned = q.split((self.size, self.turning), dim=-1)
        latent, k_turned = (
            self.c_latent(x).unsqueeze(1).split((self.n_latent, self.turning), dim=-1)
        )  # (B, 1, T, ..)
        q_turned, k_turned = self.rotate(q_turned, where), self.rotate(k_turned, where)
        way = self.expanded if where.cache is None else self.absorbed
        y = way(q, q_turned, self.ln_latent(latent), k_turned, where)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(-2))

    def expanded(self, q, q_turned, latent, k_turned, where):
        kv = self.c_up(latent.squeeze(1)).unflatten(-1, (-1, 2 * self.size)).transpose(1, 2)
        k, v = kv.chunk(2, dim=-1)
        k_turned = k_turned.expand(-1, q.size(1), -1, -1)
        q, k = torch.cat((q, q_turned), dim=-1), torch.cat((k, k_turned), dim=-1)
        return attend(q, k, v, where, self.dropout * self.training)

    def absorbed(self, q, q_turned, latent, k_turned, where):
        up_k, up_v = self.c_up.weight.view(-1, 2 * self.size, self.n_latent).chunk(
            2, dim=1
        )  # (H, D, n_latent)
        latent, k_turned = where.cache.extend(latent, k_turned)
        q, k = torch.cat((q @ up_k, q_turned), dim=-1), torch.cat((latent, k_turned), dim=-1)
        y = attend(
            q, k, latent, where, 0.0, scale=(self.size + self.turning) ** -0.5
        )  # (B, H, T, n_latent)
        return y @ up_v.mT


ATTENTION = {"mha": Attention, "mla": LatentAttention}


class FeedForward(nn.Module):
    """Linear to n_hidden (fan times that for a gated activation), activation, Linear back."""

    def __init__(self, config, activation, fan=1):
        super().__init__()
        width, scale = config.n_hidden or 4 * config.n_embd, config.mlp_scale
        self.activation = activation if scale == 1 else lambda x: scale * activation(x)
        self.c_fc = nn.Linear(config.n_embd, fan * width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


def swiglu(x):
    """SiLU of the first half gates the second (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


MLP = {
    "gelu": lambda config: FeedForward(config, F.gelu),
    "gelu_tanh": lambda config: FeedForward(
        config, lambda x: F.gelu(x, approximate="tanh")
    ),  # as GPT-2 was released
    "relu2": lambda config: FeedForward(
        config, lambda x: F.relu(x).square()
    ),  # Primer, arXiv 2109.08668
    "swiglu": lambda config: FeedForward(config, swiglu, fan=2),
}

# the norms around attention and MLP: ln_1 before it, ln_1_out of what it adds, ln_1_sum of the sum; ln_2 likewise
NORM_PLACE = {"pre": ("",), "post": ("_out",), "branch": ("", "_out"), "sum": ("", "_sum")}


class Block(nn.Module):
    """Transformer block; with norm_place=pre, GPT-2's."""

    def __init__(self, config, number=0):
        super().__init__()
        kinds = [
            NORM[config.norm] if p in NORM_PLACE[config.norm_place] else Keep
            for p in ("", "_out", "_sum")
        ]
        self.ln_1, self.ln_1_out, self.ln_1_sum = (kind(config) for kind in kinds)
        self.attn = ATTENTION[config.attention](config, number)
        self.ln_2, self.ln_2_out, self.ln_2_sum = (kind(config) for kind in kinds)
        self.mlp = MLP[config.mlp](config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, where):
        x = self.ln_1_sum(x + self.ln_1_out(self.drop(self.attn(self.ln_1(x), where))))
        return self.ln_2_sum(x + self.ln_2_out(self.drop(self.mlp(self.ln_2(x)))))


# -----------------------------------------------------------------------------
# the parts of a loop: s the state, e the group's input, both (B, T, C); i the loop, n how many


class Inject(nn.Linear):
    """Linear over [e, s], at first [I | 0] so that it hands on e (nanoLOOP; Huginn's adapter)."""

    def forward(self, s, e):
        return super().forward(torch.cat((e, s), dim=-1))

    def init(self):
        nn.init.eye_(self.weight.zero_().chunk(2, dim=-1)[0])


class Diagonal(nn.Linear):
    """decay * s + dt * B e, the decay of each channel in (0, 1) by construction (Parcae, arXiv 2604.12946)."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.n_embd, bias=False)  # B
        self.A_log = nn.Parameter(torch.zeros(config.n_embd))
        self.dt_bias = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, s, e):
        dt = F.softplus(self.dt_bias)
        return torch.exp(-dt * self.A_log.exp()) * s + dt * super().forward(e)

    def init(self):
        nn.init.eye_(self.weight)  # B
        nn.init.constant_(
            self.dt_bias, math.log(math.expm1(math.log(5) / 2))
        )  # a decay of sqrt(1 / 5)


INJECTION = {  # (s, e) -> s before the blocks, and after them
    "passthrough": (Keep, Keep),
    "add": (lambda config: torch.add, Keep),
    "inject": (lambda config: Inject(2 * config.n_embd, config.n_embd, config.bias), Keep),
    "diagonal": (Diagonal, Keep),
    "residual": (Keep, lambda config: lambda s, e: s + config.residual_share * e),
}


def small_std(config):
    """sqrt(2 / (5 C)), which Huginn's initialisations are in units of (arXiv 2502.05171)."""
    return math.sqrt(2 / (5 * config.n_embd))


class NoiseState(nn.Module):
    """Gaussian noise: fresh in training; in eval one fixed draw per position, the same in every row."""

    def __init__(self, config):
        super().__init__()
        self.std = small_std(config) * config.embedding_scale
        fixed = torch.randn(
            config.n_position, config.n_embd, generator=torch.Generator().manual_seed(0)
        )
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, e, where):
        noise = (
            torch.randn_like(e)
            if self.training
            else self.fixed[where.position].to(e.dtype).expand_as(e)
        )
        return self.std * noise


STATE_INIT = {
    "input": Keep,
    "zero": lambda config: lambda e, where: torch.zeros_like(e),
    "noise": NoiseState,
}


class LoopNoise(nn.Module):
    """Training noise on the first state of a group that loops more than once."""

    def __init__(self, config):
        super().__init__()
        self.std = config.loop_noise_scale * small_std(config)

    def forward(self, s, n):
        return s + self.std * (n > 1) * torch.randn_like(s) if self.training else s


class LearnedIndex(nn.Embedding):
    """One learned vector per loop; loops beyond max_loops share the last."""

    def forward(self, s, i):
        return s + self.weight[torch.as_tensor(i).clamp(max=self.num_embeddings - 1)]


class SinusoidalIndex(nn.Module):
    """Sines and cosines of the loop number (arXiv 1706.03762), times a learned gain per channel; goes on for ever."""

    def __init__(self, config):
        super().__init__()
        self.gain = nn.Parameter(torch.full((config.n_embd,), 0.02))

    def forward(self, s, i):
        i = torch.as_tensor(i, device=s.device).unsqueeze(-1)
        angles = i * 10000.0 ** (-torch.arange(0, s.size(-1), 2, device=s.device) / s.size(-1))
        return s + self.gain * torch.cat((angles.sin(), angles.cos()), dim=-1)


LOOP_NORM = {"none": Keep, "rmsnorm": NORM["rmsnorm"]}
LOOP_EMBEDDING = {
    "none": Keep,
    "learned": lambda config: LearnedIndex(config.max_loops, config.n_embd),
    "sinusoidal": SinusoidalIndex,
}
LOOP_EXIT = {
    "none": Keep,
    "linear": lambda config, ln_f: nn.Linear(config.n_embd, config.n_embd, bias=False),
    "final_norm": lambda config, ln_f: (
        ln_f.forward
    ),  # a method, not the module: its parameters stay the model's
}


class Loop(nn.Module):
    """A group of blocks applied n times with the same weights."""

    def __init__(self, config, blocks, ln_f):
        super().__init__()
        self.blocks = tuple(
            blocks
        )  # a tuple, not a ModuleList: their parameters belong to transformer.h
        self.init_state = STATE_INIT[config.state_init](config)
        self.noise = LoopNoise(config) if config.loop_noise_scale else Keep(config)
        self.inject, self.after = (part(config) for part in INJECTION[config.input_injection])
        self.index = LOOP_EMBEDDING[config.loop_embedding](config)
        self.norm = LOOP_NORM[config.loop_norm](config)
        self.entry, self.exit = (
            LOOP_NORM[config.loop_entry](config),
            LOOP_EXIT[config.loop_exit](config, ln_f),
        )
        self.bptt_k = config.bptt_k or math.inf

    def step(self, s, e, i, where):
        """One loop: the state (B, T, C) after loop i from the one before it."""
        s = self.index(self.inject(s, e), i)
        for block in self.blocks:
            s = block(s, where)
        return self.norm(self.after(s, e))

    def states(self, e, where, n):
        """Yields the state after each of n loops; only the last bptt_k carry a gradient."""
        e = self.entry(e)
        s = self.noise(self.init_state(e, where), n)
        for i in range(n):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= n - self.bptt_k):
                s = self.step(s, e, i, where)
            yield s

    def forward(self, e, where, n):
        return self.exit(deque(self.states(e, where, n), maxlen=1).pop())


def poisson(mean, generator, sigma=0.5):
    """1 + Poisson(rate), rate log-normal of this mean (Huginn, arXiv 2502.05171, section 3.2): mean + 1 on average."""
    rate = torch.empty(1).log_normal_(math.log(mean) - sigma**2 / 2, sigma, generator=generator)
    return 1 + int(torch.poisson(rate, generator=generator))


LOOP_SAMPLING = {  # loops of a training step: (mean, generator) -> int >= 1
    "fixed": lambda mean, generator: mean,
    "uniform": lambda mean, generator: int(torch.randint(1, 2 * mean, (1,), generator=generator)),
    "geometric": lambda mean, generator: int(
        torch.empty(1).geometric_(min(1 / mean, 1 - 1e-9), generator=generator)
    ),
    "poisson": poisson,
}


def sample_loops(config, generator, means=None):
    """Loops of one training step: one int per group in [1, max_loops], by config.loop_sampling. means: one per group,
    the config's counts by default. The draws follow from the state of generator (on CPU) alone."""
    draw = LOOP_SAMPLING[config.loop_sampling]
    return tuple(min(draw(mean, generator), config.max_loops) for mean in means or config.counts())


class MeanGate(nn.Linear):
    """Linear of the mean state of the tokens so far, s (B, T, C)."""

    def forward(self, s):
        return super().forward(
            s.cumsum(1) / torch.arange(1, s.size(1) + 1, device=s.device)[:, None]
        )


EXIT_GATE = {  # whether to stop after a loop, as a logit (B, T, 1)
    "none": Keep,
    "state": lambda config: nn.Linear(config.n_embd, 1),  # Ouro, arXiv 2510.25741
    "mean_state": lambda config: MeanGate(config.n_embd, 1),
}


class ShiftToken(nn.Embedding):
    """Puts a learned token before the input x (B, T, C) that says how far ahead to predict: shift, an int or (B,)."""

    def forward(self, x, shift):
        token = super().forward(torch.as_tensor(shift, device=x.device) - 1)
        return torch.cat((token.expand(x.size(0), -1).unsqueeze(1), x), dim=1)


class Ahead(nn.Linear):
    """Hidden states for one token further ahead, x + SiLU(Linear(x)), at first x (Medusa, arXiv 2401.10774)."""

    def forward(self, x):
        return x + F.silu(super().forward(x))

    def init(self):
        nn.init.zeros_(self.weight)


def shift_labels(targets, shift):
    """The tokens shift ahead, from the next ones, targets (B, T); -1 where the window has none. shift: int or (B,)."""
    shift = torch.as_tensor(shift, device=targets.device).expand(targets.size(0))
    source = torch.arange(targets.size(1), device=targets.device) + shift[:, None] - 1  # (B, T)
    return targets.gather(1, source.clamp(max=targets.size(1) - 1)).masked_fill(
        source >= targets.size(1), -1
    )


# -----------------------------------------------------------------------------
# the GPT


INIT = {  # how a matrix is filled, its std, and that of one whose outputs are added to the residual stream
    "gpt2": lambda config: (
        lambda p, std: nn.init.normal_(p, std=std),
        0.02,
        0.02 / math.sqrt(2 * config.n_physical),
    ),
    "small": lambda config: (
        lambda p, std: nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std),
        small_std(config),
        small_std(config) / math.sqrt(2 * config.n_effective),
    ),
    "orthogonal": lambda config: (
        lambda p, std: nn.init.orthogonal_(p, gain=std * math.sqrt(max(p.shape))),
        small_std(config),
        0.0,
    ),  # every block starts as the identity
}
TABLES = {
    "norm": NORM,
    "norm_place": NORM_PLACE,
    "position": POSITION,
    "attention": ATTENTION,
    "qk_norm": QK_NORM,
    "mlp": MLP,
    "init": INIT,
    "input_injection": INJECTION,
    "state_init": STATE_INIT,
    "loop_norm": LOOP_NORM,
    "loop_entry": LOOP_NORM,
    "loop_exit": LOOP_EXIT,
    "loop_embedding": LOOP_EMBEDDING,
    "loop_sampling": LOOP_SAMPLING,
    "exit_gate": EXIT_GATE,
}


class GPT(nn.Module):
    """A GPT with nanoGPT's parameter names; each looped group adds transformer.loops.{g}.* and nothing else."""

    def __init__(self, config):
        super().__init__()
        self.config, self.block_size, self.embedding_scale = (
            config,
            config.block_size,
            config.embedding_scale,
        )
        separator = config.document_separator
        self.look = one_document if separator < 0 else partial(documents, separator=separator)
        self.turn = POSITION[config.position][2](config)
        blocks = [Block(config, number) for number in range(config.n_physical)]
        ln_f = NORM[config.norm](config) if config.final_norm else Keep(config)
        loops = {
            group: Loop(config, blocks[group[0] : group[-1] + 1], ln_f) for group in config.groups
        }
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": POSITION[config.position][0](config),
                "ln_e": NORM[config.norm](config) if config.embedding_norm else Keep(config),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(blocks),
                "loops": nn.ModuleList(loops.values()),
                "ln_f": ln_f,
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight  # arXiv 1608.05859
        self.prefix = (
            ShiftToken(config.max_shift, config.n_embd) if config.predict_ahead else Keep()
        )
        self.ahead = nn.ModuleList(
            Ahead(config.n_embd, config.n_embd, config.bias) for _ in range(config.n_ahead - 1)
        )
        self.exit_gate = EXIT_GATE[config.exit_gate](config)
        cap = config.logit_softcap
        self.cap = (lambda logits: cap * torch.tanh(logits / cap)) if cap else Keep(config)
        self.stages = tuple(
            loops[stage] if looped else blocks[stage[0]] for stage, looped in config.stages
        )
        self.init_weights()

    def init_weights(self):
        """By config.init; biases 0, norms 1, and what has an init() of its own by that."""
        fill, std, output_std = INIT[self.config.init](self.config)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                fill(p, output_std if name.endswith("c_proj.weight") else std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (Inject, Diagonal, Ahead)):
                    module.init()

    def embed(self, idx, cache=None, shift=1):
        """Token ids (B, T), or embeddings (B, T, C), to x (B, T, C) and where they stand, which a cache knows better.
        With predict_ahead the token of shift, an int or (B,), comes before the first of them: x (B, T + 1, C)."""
        seen = 0 if cache is None else cache.length
        if seen + idx.size(1) > self.block_size:
            raise ValueError(
                f"{seen + idx.size(1)} tokens are more than block_size={self.block_size}"
            )
        x = idx if idx.is_floating_point() else self.embedding_scale * self.transformer.wte(idx)
        x = x if seen else self.prefix(x, shift)
        position, mask = (self if cache is None else cache).look(x, idx)
        where = Where(position, mask, self.turn(position), idx, cache)
        return self.transformer.drop(self.transformer.ln_e(self.transformer.wpe(x, where))), where

    def schedule(self, n_loop=None):
        """The stages in order, each with what its call needs besides x: [(block, ()), (loop, (count,)), ...]."""
        counts = iter(self.config.counts(n_loop))
        return [
            (stage, (next(counts),) if isinstance(stage, Loop) else ()) for stage in self.stages
        ]

    def hidden(self, idx, n_loop=None, cache=None, shift=1):
        """The last hidden states (B, T, C), which the head reads, of tokens or embeddings as embed takes them."""
        x, where = self.embed(idx, cache, shift)
        for stage, count in self.schedule(n_loop):
            x = stage(x, where, *count)
        return self.transformer.ln_f(x[:, -idx.size(1) :])

    def logits(self, x):
        """Of hidden states (B, T, C): (B, T, V)."""
        return self.cap(self.lm_head(x))

    def forward(self, idx, targets=None, n_loop=None, cache=None, shift=1):
        """Logits (B, T, V) and loss (nats per token) of idx (B, T), int64, or of embeddings (B, T, C) in its place;
        without targets logits of the last position (B, 1, V) and None.
        targets (B, T): the next tokens, -1 for none; with a shift of more than 1 (int or (B,), for a model that was
        trained to predict_ahead) the tokens so far ahead among them are predicted. n_loop: None (the config's counts),
        an int >= 1 or one per group, whatever the model was trained at, else ValueError. cache: a decode.Cache of the
        tokens before."""
        x = self.hidden(idx, n_loop, cache, shift)
        if targets is None:
            return self.logits(x[:, [-1]]), None
        logits = self.logits(x)
        return logits, F.cross_entropy(
            logits.flatten(0, 1), shift_labels(targets, shift).flatten(), ignore_index=-1
        )

    @torch.no_grad()
    def loops_representation(self, idx, n_loop=None):
        """The state after every loop of every group: one list per group of n tensors (B, T, C)."""
        (x, where), groups = self.embed(idx), []
        for stage, count in self.schedule(n_loop):
            if count:
                groups.append(list(stage.states(x, where, *count)))
            x = stage.exit(groups[-1][-1]) if count else stage(x, where)
        return groups

    def flops_per_token(self, n_loop=None, bptt_k=None):
        """FLOPs of forward and backward per token of a full window, of all matrix products and attention.
        Multiply-adds are 2, backward is twice forward, attention not causal (PaLM, arXiv 2204.02311, appendix B);
        every loop runs forward, the last bptt_k (None: the config's, 0: all) backward."""
        k = self.config.bptt_k if bptt_k is None else bptt_k
        total = 3 * self.forward_flops(self.lm_head)
        for stage, count in self.schedule(n_loop):
            n = sum(count) or 1
            parts = (stage.inject, *stage.blocks) if count else (stage,)
            total += (n + 2 * min(n, k or n)) * sum(map(self.forward_flops, parts))
            total += 3 * self.forward_flops(stage.exit) if count else 0
        return total

    def forward_flops(self, part):
        """Of a module per token of a full window."""
        modules = list(part.modules()) if isinstance(part, nn.Module) else []  # a function has none
        linear = sum(m.weight.numel() for m in modules if isinstance(m, nn.Linear))
        pairs = sum(m.n_products for m in modules if isinstance(m, (Attention, LatentAttention)))
        return 2 * (linear + self.block_size * pairs)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, each counted once; position embeddings not counted, as in nanoGPT."""
        left_out = self.transformer.wpe.parameters() if non_embedding else ()
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in left_out)


# -----------------------------------------------------------------------------
# spectral clipping


def matrix_sign(W):
    """U V^T of W = U S V^T (..., m, n), m <= n, by Newton-Schulz: eight coarse steps (Muon's), four that settle."""
    X = W / (torch.linalg.matrix_norm(W, keepdim=True) + 1e-30)
    for a, b, c in 8 * [(3.4445, -4.7750, 2.0315)] + 4 * [(1.875, -1.25, 0.375)]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def spectral_clip(W, beta):
    """W (..., m, n) with its singular values above beta brought to beta (leloykun.github.io/ponder/spectral-clipping).
    W - max(P - beta, 0) sign(W), W = P sign(W), in float32: signs that have not settled for tiny values do no harm."""
    if W.size(-2) > W.size(-1):
        return spectral_clip(W.mT, beta).mT
    sign = matrix_sign(W.float())
    P = W.float() @ sign.mT
    D = (P + P.mT) / 2 - beta * torch.eye(P.size(-1), device=W.device)
    return (W - (D + D @ matrix_sign(D)) / 2 @ sign).type_as(W)

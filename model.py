"""
A GPT in which groups of blocks may be applied several times with the same weights.

    forward:  embed -> stages -> readout             stage: consecutive blocks, looped or not
    loop:     for i in range(n): s = step(s, e, i)   e: what enters the loop, s: its state
    step:     s = norm(blocks(inject(s, e)))         options add: which loop it is, e once more

Prelude, core and coda are the stages before, in and after the loop. Every stage is a Loop: where
nothing is looped, one whose options are all off. The first half of this file is the model; below a
double ruler follows a catalogue: the parts that options choose, TABLES that say which option is
which part, checks. The config is read in __init__ only; what is off is a module that does nothing.
Shapes: B batch, T time (tokens), C channels (n_embd), H heads, D channels of a head, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class GPTConfig:
    """Every choice about the model. ValueError names the field, its value and what is allowed."""

    # shape
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 ids, padded to a multiple of 64 for speed
    n_layer: int = 12  # blocks, of a plain GPT and with loop_groups; not read with n_block
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels of the residual stream
    dropout: float = 0.0  # 0 for pretraining, 0.1 and more for small data
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2 has them; False is a bit faster
    norm: str = "layernorm"  # layernorm, rmsnorm, weightless (rmsnorm without a gain)
    position: str = "learned"  # learned, rope, none
    attention: str = "mha"  # mha (multi-head), mla (keys and values from one latent vector)
    mlp: str = "gelu"  # gelu, gelu_tanh, relu2, swiglu
    # what is looped: n_block between n_prelude and n_coda, or loop_groups of n_layer blocks
    n_prelude: int = 0  # blocks before the looped core
    n_block: int = 0  # blocks of the looped core; 0: no core
    n_coda: int = 0  # blocks after the looped core
    n_loop: int = 1  # loops of every group; with a sampled depth their mean (poisson: 1 less)
    loop_groups: tuple = ()  # [[0,1],[3]] loops blocks 0 and 1 together, and block 3
    loop_counts: tuple = ()  # loops of each group, instead of n_loop
    max_loops: int = 64  # bound of a sampled depth; rows of the learned loop embedding
    use_model_baseline: bool = False  # the control run: the same blocks with nothing looped
    # what a loop does
    input_injection: str = (  # input to loops: passthrough, add, inject, inject_bias, diagonal,
        "inject"  # orthogonal, residual
    )
    residual_share: float = 0.1  # share of its input that residual adds after each loop
    state_init: str = "input"  # state before the first loop: input, zero, noise, hash (IFM)
    loop_noise_scale: float = 0.0  # std of training noise on it, in units of sqrt(2 / (5 n_embd))
    loop_norm: str = "rmsnorm"  # norm of the state after each loop: none, rmsnorm, weightless
    loop_embedding: str = "none"  # tells the blocks which loop it is: none, learned, sinusoidal
    loop_sampling: str = "fixed"  # loops of a training step: fixed, uniform, geometric, poisson
    bptt_k: int = 0  # gradient through the last k loops only; 0: through all of them
    exit_gate: str = "none"  # learns when to stop looping: none, state (Ouro), mean_state
    # what is predicted
    n_ahead: int = 1  # heads, each for one token further ahead (arXiv 2404.19737)
    predict_ahead: bool = False  # a token before each window says how far ahead to predict
    max_shift: int = 4  # the farthest that predict_ahead asks for
    label_shift_prob: float = 0.5  # p of the shift's geometric distribution
    # rarely: variants of other families of models; the defaults are GPT-2's
    n_kv_head: int = 0  # heads of keys and values, each shared by several query heads; 0: n_head
    head_size: int = 0  # channels of a head; 0: n_embd / n_head
    n_latent: int = 0  # channels of mla's latent vector; 0: n_embd / 2
    n_hidden: int = 0  # channels inside the MLP; 0: 4 n_embd
    mlp_scale: float = 1.0  # factor on the MLP's activations (Parcae: 0.5)
    qk_norm: str = "none"  # none, head (Qwen3), width (all heads: OLMo-2), rotated (Parcae)
    qk_bias: bool = False  # learned bias of queries and keys (Huginn)
    value_embedding: bool = False  # every other block adds token embeddings to values (Parcae)
    rope_base: float = 10000.0  # wavelengths of rotary positions grow up to this, in 2 pi tokens
    rope_scaling: tuple = ()  # Llama 3's: factor, low and high frequency factor, old block_size
    norm_place: str = "pre"  # pre, post (OLMo-2), branch (both: Ouro), sum (pre and sum: Huginn)
    norm_eps: float = 0.0  # added inside the root; 0: LayerNorm 1e-5, RMSNorm machine epsilon
    embedding_scale: float = 1.0  # factor on the token embedding (Huginn: sqrt(n_embd))
    final_norm: bool = True  # norm before the head; False where the loop's norm is the last (Ouro)
    tie_weights: bool = True  # the head's matrix is the embedding's
    logit_softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0: off
    init: str = "gpt2"  # gpt2, small (Huginn), orthogonal (blocks start as identity: Parcae)
    loop_entry: str = "none"  # norm of the group's input: none, rmsnorm (Parcae)
    loop_exit: str = "none"  # after the last loop: none, linear (Parcae), final_norm (Huginn)
    document_separator: int = -1  # token id that ends a document; attention stops there; -1: none
    attention_window: int = 0  # tokens that attention sees, its own the last of them; 0: all

    def __post_init__(self):
        check_config(self)  # at the end of this file

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def n_position(self) -> int:
        """Positions of a full window: its tokens, and the token before them with predict_ahead."""
        return self.block_size + self.predict_ahead

    @property
    def n_physical(self) -> int:
        """Blocks that the model holds."""
        return self.n_prelude + self.n_block + self.n_coda if self.n_block else self.n_layer

    @property
    def n_effective(self) -> int:
        """Depth in block applications: a block that is looped n times counts n times."""
        repeats = ((n - 1) * len(group) for n, group in zip(self.counts(), self.groups))
        return self.n_physical + sum(repeats)

    @property
    def groups(self) -> tuple:
        """Looped groups of blocks, whichever way they were given: ((0, 1), (3,))."""
        core = tuple(range(self.n_prelude, self.n_prelude + self.n_block))
        groups = (core,) if self.n_block else tuple(map(tuple, self.loop_groups))
        return () if self.use_model_baseline else groups

    @property
    def layout(self) -> tuple:
        """Stages in order, (block numbers, looped): (((0, 1), False), ((2,), True), ..)."""
        group_of = {block: group for group in self.groups for block in group}
        stages = groupby(range(self.n_physical), group_of.get)
        return tuple((tuple(blocks), group is not None) for group, blocks in stages)

    def counts(self, n_loop: int | tuple | None = None) -> tuple[int, ...]:
        """Return the loops of each group. n_loop: None (the config's), an int, or one per group."""
        if n_loop is None:
            n_loop = self.loop_counts if self.loop_counts and self.groups else self.n_loop
        per_group = isinstance(n_loop, (tuple, list))
        counts = tuple(n_loop) if per_group else (n_loop,)
        legal = all(type(n) is int and n >= 1 for n in counts)
        if not legal or (per_group and len(counts) != len(self.groups)):
            allowed = f"an int >= 1, or one for each of {len(self.groups)} groups"
            raise ValueError(f"n_loop={n_loop!r}: must be {allowed}")
        return counts if per_group else counts * len(self.groups)


# -----------------------------------------------------------------------------
# a plain block, GPT-2's unless an option says otherwise
class Context(NamedTuple):
    """Facts about the tokens of a forward pass, handed to every block beside x (B, T, C)."""

    position: Tensor  # (T,), or (B, T) where rows differ; counted from the start of the document
    mask: Tensor | None = None  # (.., T, S), True where a token may look; None: causal
    cos_sin: tuple | None = None  # of rotary positions, (.., 1, T, D/2) each
    idx: Tensor | None = None  # (B, T), the token ids
    cache: object = None  # earlier tokens when decoding: extend(k, v) -> k, v of all S tokens

    def rows(self, pick: Tensor | slice) -> "Context":
        """Return the context of some rows, a slice or their numbers; the cache stays as it is."""
        if self.position.dim() == 1:  # every row has these positions and this mask
            return self._replace(idx=self.idx[pick])
        mask = None if self.mask is None else self.mask[pick]
        cos_sin = None if self.cos_sin is None else tuple(part[pick] for part in self.cos_sin)
        return Context(self.position[pick], mask, cos_sin, self.idx[pick], self.cache)


class Identity(nn.Identity):
    """Returns its first argument: the part of an option that is off, whatever arguments it gets."""

    def forward(self, x: Tensor, *_) -> Tensor:
        return x


def make(field: str, config: GPTConfig, *others) -> nn.Module:
    """Return the part that a field of the config names, by TABLES at the end of this file."""
    return TABLES[field][getattr(config, field)](config, *others)


class Attention(nn.Module):
    """Causal self-attention; fewer heads of keys and values than of queries is grouped-query."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        H, K = config.n_head, config.n_kv_head or config.n_head
        self.heads = (H, K, K)  # of queries, keys and values
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, (H + 2 * K) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(H * self.head_dim, config.n_embd, bias=config.bias)
        self.macs_per_pair = 2 * H * self.head_dim  # of a query and a key: score, value
        # what other families add to GPT-2's attention
        self.q_norm = make("qk_norm", config, H)
        self.k_norm = make("qk_norm", config, K)
        norm = nn.RMSNorm(self.head_dim, elementwise_affine=False)
        self.rotated_norm = norm if config.qk_norm == "rotated" else Identity()
        self.q_bias = QKBias(config, H) if config.qk_bias else Identity()
        self.k_bias = QKBias(config, K) if config.qk_bias else Identity()
        every_other = (config.n_physical - 1 - layer) % 2 == 0  # counted from the last block
        embeds = config.value_embedding and every_other
        self.value = ValueEmbedding(config, K) if embeds else Identity()
        self.rotate = rotate if config.position == "rope" else Identity()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (-1, self.head_dim))  # (B, T, heads, D)
        q, k, v = qkv.split(self.heads, dim=-2)
        q = self.q_norm(self.q_bias(q)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_bias(k)).transpose(1, 2)
        v = self.value(v, x, ctx).transpose(1, 2)
        q = self.rotated_norm(self.rotate(q, ctx))
        k = self.rotated_norm(self.rotate(k, ctx))
        if ctx.cache is not None:  # decoding: keys and values of earlier tokens come from there
            k, v = ctx.cache.extend(k, v)
        y = attend(q, k, v, ctx, self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Linear to n_hidden channels, activation, Linear back; a gated activation reads two halves."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        n_hidden = config.n_hidden or 4 * config.n_embd
        n_read = 2 * n_hidden if config.mlp == "swiglu" else n_hidden
        activation, scale = TABLES["mlp"][config.mlp], config.mlp_scale
        self.activation = activation if scale == 1 else lambda x: scale * activation(x)
        self.c_fc = nn.Linear(config.n_embd, n_read, bias=config.bias)
        self.c_proj = nn.Linear(n_hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Transformer block. GPT-2's (norm_place=pre) is x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.ln_1 = norm_at("input", config)
        self.ln_1_out = norm_at("output", config)
        self.ln_1_sum = norm_at("sum", config)
        self.attn = make("attention", config, layer)
        self.ln_2 = norm_at("input", config)
        self.ln_2_out = norm_at("output", config)
        self.ln_2_sum = norm_at("sum", config)
        self.mlp = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        attn = self.drop(self.attn(self.ln_1(x), ctx))
        x = self.ln_1_sum(x + self.ln_1_out(attn))
        mlp = self.drop(self.mlp(self.ln_2(x)))
        return self.ln_2_sum(x + self.ln_2_out(mlp))


# -----------------------------------------------------------------------------
# the loop
class Loop(nn.Module):
    """A group of blocks that is applied n times with the same weights."""

    def __init__(self, config: GPTConfig, blocks: list[Block], ln_f: nn.Module):
        super().__init__()
        self.blocks = tuple(blocks)  # no ModuleList: their parameters belong to transformer.h
        self.init_state = make("state_init", config)
        self.noise = LoopNoise(config) if config.loop_noise_scale else Identity()
        self.inject = make("input_injection", config)
        residual = config.input_injection == "residual"
        self.reinject = partial(add_share, config.residual_share) if residual else Identity()
        self.index = make("loop_embedding", config)
        self.norm = make("loop_norm", config)
        self.entry = make("loop_entry", config)
        self.exit = make("loop_exit", config, ln_f)
        self.bptt_k = config.bptt_k or math.inf

    def begin(self, x: Tensor, ctx: Context, n: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return (e, s): what is injected in every loop, and the state before the first of n."""
        e = self.entry(x)
        return e, self.noise(self.init_state(e, ctx), n)

    def step(self, s: Tensor, e: Tensor, i: int | Tensor, ctx: Context) -> Tensor:
        """Return the state (B, T, C) after loop i: an int, or (B, 1), each row's own. s: before."""
        s = self.index(self.inject(s, e), i)
        for block in self.blocks:
            s = block(s, ctx)
        return self.norm(self.reinject(s, e))

    def states(self, x: Tensor, ctx: Context, n: int) -> Iterator[Tensor]:
        """Yield the state after each of n loops. Only the last bptt_k loops carry a gradient."""
        e, s = self.begin(x, ctx, n)
        for i in range(n):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= n - self.bptt_k):
                s = self.step(s, e, i, ctx)
            yield s

    def forward(self, x: Tensor, ctx: Context, n: int) -> Tensor:
        for state in self.states(x, ctx, n):
            s = state  # only the last is kept
        return self.exit(s)


class Stage(NamedTuple):
    """Consecutive blocks, all or none of them looped, and how often this pass applies them."""

    loop: Loop
    n: int  # 1 for blocks outside every group
    looped: bool  # a group, so that n comes from n_loop

    def __call__(self, x: Tensor, ctx: Context) -> Tensor:
        return self.loop(x, ctx, self.n)


class Inject(nn.Linear):
    """Injection Linear([e, s]), initially e alone: to carry s on is learned (nanoLOOP, Huginn)."""

    def __init__(self, config: GPTConfig):
        super().__init__(2 * config.n_embd, config.n_embd, config.bias)

    def forward(self, s: Tensor, e: Tensor) -> Tensor:
        return super().forward(torch.cat((e, s), dim=-1))

    def init(self) -> None:
        of_e, of_s = self.weight.chunk(2, dim=-1)  # (C, C) each
        nn.init.eye_(of_e)
        nn.init.zeros_(of_s)


def sample_loops(config: GPTConfig, generator: torch.Generator, means=None) -> tuple[int, ...]:
    """Draw the loops of a training step, one int per group in [1, max_loops]; means: counts()."""
    draw = TABLES["loop_sampling"][config.loop_sampling]
    means = means or config.counts()
    return tuple(min(draw(mean, generator), config.max_loops) for mean in means)


# -----------------------------------------------------------------------------
# the GPT
class GPT(nn.Module):
    """A GPT with nanoGPT's parameter names; a looped group g adds transformer.loops.{g}.* only."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.block_size = config.block_size
        self.embedding_scale = config.embedding_scale
        separator, window = config.document_separator, config.attention_window
        all_before = partial(documents, separator) if separator >= 0 else causal
        self.positions_and_mask = partial(windowed, window, all_before) if window else all_before
        self.cos_sin = RotaryPosition(config) if config.position == "rope" else no_rotation
        ln_f = make("norm", config) if config.final_norm else Identity()
        blocks = [Block(config, layer) for layer in range(config.n_physical)]
        plain = replace(config, **LOOP_OFF)  # for the blocks outside every group
        self.stage_loops, groups = [], nn.ModuleList()  # of all stages; of the looped ones
        for numbers, looped in config.layout:
            loop = Loop(config if looped else plain, [blocks[i] for i in numbers], ln_f)
            self.stage_loops.append(loop)
            if looped:
                groups.append(loop)
        learned, C = config.position == "learned", config.n_embd
        position = LearnedPosition(config.n_position, C) if learned else Identity()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, C),
                "wpe": position,
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(blocks),
                "loops": groups,
                "ln_f": ln_f,
            }
        )
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight  # arXiv 1608.05859
        self.cap = partial(softcap, config.logit_softcap) if config.logit_softcap else Identity()
        self.prefix = ShiftToken(config.max_shift, C) if config.predict_ahead else Identity()
        self.ahead = nn.ModuleList(Ahead(C, C, config.bias) for _ in range(config.n_ahead - 1))
        self.exit_gate = make("exit_gate", config)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill matrices by config.init, biases with 0; a part with an init() starts by that."""
        fill = TABLES["init"][self.config.init]
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                fill(self.config, p, is_output=name.endswith("c_proj.weight"))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            for module in self.modules():
                if hasattr(module, "init"):
                    module.init()

    def embed(self, idx: Tensor, cache=None, shift: int | Tensor = 1) -> tuple[Tensor, Context]:
        """Return x (B, T, C) and the Context of idx: token ids (B, T), or embeddings (B, T, C).

        cache: a CacheView of decode.py, whose tokens come before these. With predict_ahead the
        token of shift, an int or (B,), comes before the first: x is (B, T + 1, C) then.
        """
        n_before = 0 if cache is None else cache.length
        n_tokens = n_before + idx.size(1)
        if n_tokens > self.block_size:
            raise ValueError(f"{n_tokens} tokens are more than block_size={self.block_size}")
        embeddings = idx.is_floating_point()
        x = idx if embeddings else self.embedding_scale * self.transformer.wte(idx)
        if n_before == 0:
            x = self.prefix(x, shift)
        source = self if cache is None else cache  # a CacheView knows where its rows' tokens end
        position, mask = source.positions_and_mask(x, idx)
        ctx = Context(position, mask, self.cos_sin(position), idx, cache)
        return self.transformer.drop(self.transformer.wpe(x, ctx)), ctx

    def schedule(self, n_loop: int | tuple | None = None) -> list[Stage]:
        """Return the stages of a forward pass, in order, at these loops (as counts takes them)."""
        counts = iter(self.config.counts(n_loop))
        stages = zip(self.stage_loops, self.config.layout)
        return [Stage(loop, next(counts) if looped else 1, looped) for loop, (_, looped) in stages]

    def around_group(self, n_loop: int | tuple | None = None, group: int = -1):
        """Return (stages before, stage, stages after) of a looped group; of the last if none is."""
        stages = self.schedule(n_loop)
        looped = [i for i, stage in enumerate(stages) if stage.looped] or [len(stages) - 1]
        i = looped[group]
        return stages[:i], stages[i], stages[i + 1 :]

    def hidden(self, idx: Tensor, n_loop=None, cache=None, shift: int | Tensor = 1) -> Tensor:
        """Return the last hidden states (B, T, C), which the head reads. idx as in embed."""
        x, ctx = self.embed(idx, cache, shift)
        for stage in self.schedule(n_loop):
            x = stage(x, ctx)
        return self.transformer.ln_f(x[:, -idx.size(1) :])  # without the token of predict_ahead

    def logits(self, x: Tensor) -> Tensor:
        """Project last hidden states (B, T, C) to logits (B, T, V)."""
        return self.cap(self.lm_head(x))

    def forward(self, idx: Tensor, targets: Tensor | None = None, n_loop=None, cache=None, shift=1):
        """Return (logits, loss): (B, T, V) and nats per token; without targets (B, 1, V) and None.

        idx: as in embed. targets (B, T): the next tokens, -1 for none. n_loop: None (the config's),
        an int, or one int per group; any count works, whatever the model was trained at. shift: how
        far ahead to predict, with predict_ahead. ValueError for what cannot be.
        """
        x = self.hidden(idx, n_loop, cache, shift)
        if targets is None:
            return self.logits(x[:, [-1]]), None
        logits = self.logits(x)
        targets = shift_labels(targets, shift).flatten()
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-1)

    @torch.no_grad()
    def loops_representation(self, idx: Tensor, n_loop=None) -> list[list[Tensor]]:
        """Return the state after every loop: a list per group of n tensors (B, T, C)."""
        x, ctx = self.embed(idx)
        groups = []
        for loop, n, looped in self.schedule(n_loop):
            states = list(loop.states(x, ctx, n))
            x = loop.exit(states[-1])
            if looped:
                groups.append(states)
        return groups

    def flops_per_token(self, n_loop=None, bptt_k: int | None = None) -> int:
        """Return forward and backward FLOPs per token of a full window: products and attention.

        Multiply-adds are 2, backward twice forward, attention not causal (PaLM, 2204.02311, B). All
        loops run forward, the last bptt_k (None: the config's, 0: all) backward too.
        """
        k = self.config.bptt_k if bptt_k is None else bptt_k
        total = 3 * self.forward_flops(self.lm_head)
        for loop, n, _ in self.schedule(n_loop):
            one_loop = sum(map(self.forward_flops, (loop.inject, *loop.blocks)))
            total += (n + 2 * min(n, k or n)) * one_loop + 3 * self.forward_flops(loop.exit)
        return total

    def forward_flops(self, module: nn.Module) -> int:
        """Return the forward FLOPs of one module, per token of a full window."""
        parts = list(module.modules())
        products = sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))
        pairs = self.block_size * sum(getattr(part, "macs_per_pair", 0) for part in parts)
        return 2 * (products + pairs)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count the parameters; without the position embedding by default, as in nanoGPT."""
        excluded = self.transformer.wpe.parameters() if non_embedding else ()
        return sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in excluded)


# -----------------------------------------------------------------------------
# shifted labels, spectral clipping
class ShiftToken(nn.Embedding):
    """Puts a learned token before x (B, T, C) that says how far ahead to predict."""

    def forward(self, x: Tensor, shift: int | Tensor) -> Tensor:
        token = self.weight[shift - 1].expand(x.size(0), -1)  # (B, C)
        return torch.cat((token.unsqueeze(1), x), dim=1)


def shift_labels(targets: Tensor, shift: int | Tensor) -> Tensor:
    """Return the tokens shift (an int or (B,)) ahead of the inputs; -1 beyond targets (B, T)."""
    T = targets.size(1)
    ahead = shift[:, None] if isinstance(shift, Tensor) else shift  # no copy to the device
    source = (torch.arange(T, device=targets.device) + ahead - 1).expand_as(targets)
    return targets.gather(1, source.clamp(max=T - 1)).masked_fill(source >= T, -1)


def spectral_clip(W: Tensor, beta: float) -> Tensor:
    """Return W (.., m, n) with its singular values above beta brought to beta.

    In float32, W - max(P - beta, 0) sign(W) with W = P sign(W): there the sign of a tiny singular
    value, which has not converged, does no harm (leloykun.github.io/ponder/spectral-clipping).
    """
    if W.size(-2) > W.size(-1):
        return spectral_clip(W.mT, beta).mT
    sign = matrix_sign(W.float())
    P = W.float() @ sign.mT
    excess = (P + P.mT) / 2 - beta * torch.eye(P.size(-1), device=W.device)
    return (W - (excess + excess @ matrix_sign(excess)) / 2 @ sign).type_as(W)


def matrix_sign(W: Tensor) -> Tensor:
    """Return U V^T of W = U S V^T (.., m, n), m <= n: 8 Newton-Schulz steps of Muon's, 4 exact."""
    X = W / (torch.linalg.matrix_norm(W, keepdim=True) + 1e-30)
    for a, b, c in 8 * [(3.4445, -4.7750, 2.0315)] + 4 * [(1.875, -1.25, 0.375)]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


# =============================================================================
# catalogue: what the GPT needs to be GPT-2, Huginn, Ouro, Parcae, Llama, Qwen3, OLMo-2
# =============================================================================
# parts of a block, and what stands before and after all blocks
class LearnedPosition(nn.Embedding):
    """One learned vector per position, added to the token embedding (GPT-2)."""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return x + super().forward(ctx.position)


class RotaryPosition(nn.Module):
    """Rotary positions: angles position * base^(-2i/D), as cos and sin (arXiv 2104.09864)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.head_dim // 2 if config.attention == "mla" else config.head_dim
        frequencies = config.rope_base ** (-torch.arange(0, width, 2) / width)
        if config.rope_scaling:  # Llama 3.1: slow ones divided by factor, fast ones kept, a blend
            factor, low, high, context = config.rope_scaling
            wavelengths = context * frequencies / (2 * math.pi)  # that fit in the old context
            kept = ((wavelengths - low) / (high - low)).clamp(0, 1)
            frequencies = frequencies * (kept + (1 - kept) / factor)
        angles = torch.outer(torch.arange(config.n_position), frequencies)  # (n_position, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:  # (.., T)
        return self.cos[position].unsqueeze(-3), self.sin[position].unsqueeze(-3)


def no_rotation(position: Tensor) -> None:
    """Return the cos and sin of models without rotary positions."""


def rotate(x: Tensor, ctx: Context) -> Tensor:
    """Rotate channels i and i + D/2 of queries or keys (B, H, T, D) by their position's angles."""
    cos, sin = ctx.cos_sin
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def causal(x: Tensor, idx: Tensor) -> tuple[Tensor, None]:
    return torch.arange(x.size(1), device=x.device), None


def documents(separator: int, x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and mask of windows of several documents, each read as if it were alone."""
    if idx.is_floating_point():
        raise ValueError("document_separator: needs token ids, embeddings have none")
    place = torch.arange(idx.size(1), device=idx.device).expand_as(idx)  # (B, T)
    is_first = F.pad(idx == separator, (1, -1))  # right after a separator
    start = torch.where(is_first, place, 0).cummax(1).values
    same_document = start[:, None, :, None] == start[:, None, None, :]  # (B, 1, T, T)
    return place - start, same_document.tril()


def windowed(window: int, all_before: Callable, x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return what all_before does, but a mask where a token sees only the last window tokens."""
    position, mask = all_before(x, idx)
    near = x.new_ones(x.size(1), x.size(1), dtype=torch.bool).tril().triu(1 - window)
    return position, near if mask is None else mask & near


def norm_at(place: str, config: GPTConfig) -> nn.Module:
    """Return the norm at one place around attention and MLP: their input, their output, the sum."""
    return make("norm", config) if place in TABLES["norm_place"][config.norm_place] else Identity()


def head_norm(config: GPTConfig, n_head: int) -> nn.Module:
    return nn.RMSNorm(config.head_dim, config.norm_eps or None)


class WidthNorm(nn.RMSNorm):
    """RMSNorm over all heads of queries or keys (B, T, H, D) together (OLMo-2)."""

    def __init__(self, config: GPTConfig, n_head: int):
        super().__init__(n_head * config.head_dim, config.norm_eps or None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class QKBias(nn.Module):
    """Learned bias of queries or keys (B, T, H, D) (Huginn)."""

    def __init__(self, config: GPTConfig, n_head: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_head * config.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(x.shape[-2:])


class ValueEmbedding(nn.Module):
    """Adds an embedding of each token to its values, times a gate per head (Parcae)."""

    def __init__(self, config: GPTConfig, n_head: int):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, n_head * config.head_dim)
        self.gate = nn.Linear(min(32, config.n_embd), n_head, bias=False)

    def forward(self, v: Tensor, x: Tensor, ctx: Context) -> Tensor:  # v (B, T, H, D), x (B, T, C)
        if ctx.idx.is_floating_point():
            raise ValueError("value_embedding: needs token ids, embeddings have none")
        gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, H)
        return v + gate.unsqueeze(-1) * self.table(ctx.idx).view_as(v)


def attend(q, k, v, ctx: Context, dropout: float, scale: float | None = None) -> Tensor:
    """Return softmax(q k^T) v, (B, H, T, D); k and v may have fewer heads than q."""
    causal, grouped = ctx.mask is None, k.size(1) != q.size(1)
    sdpa = F.scaled_dot_product_attention
    return sdpa(q, k, v, ctx.mask, dropout, causal, scale=scale, enable_gqa=grouped)


class LatentAttention(nn.Module):
    """Keys and values of all heads from one latent vector per token (MLA: 2405.04434, 2.1)."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        C, H, D, bias = config.n_embd, config.n_head, config.head_dim, config.bias
        self.head_dim = D
        self.n_latent = config.n_latent or C // 2
        self.rope_dim = D // 2 if config.position == "rope" else 0  # more channels, rotated
        self.dropout = config.dropout
        self.c_q = nn.Linear(C, H * (D + self.rope_dim), bias=bias)
        self.c_latent = nn.Linear(C, self.n_latent + self.rope_dim, bias=bias)  # heads share it
        self.ln_latent = nn.RMSNorm(self.n_latent, config.norm_eps or None)
        self.c_up = nn.Linear(self.n_latent, H * 2 * D, bias=False)  # keys and values
        self.c_proj = nn.Linear(H * D, C, bias=bias)
        self.macs_per_pair = H * (2 * D + self.rope_dim)
        self.rotate = rotate if config.position == "rope" else Identity()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q = self.c_q(x).unflatten(-1, (-1, self.head_dim + self.rope_dim)).transpose(1, 2)
        q, q_rope = q.split((self.head_dim, self.rope_dim), dim=-1)  # (B, H, T, ..)
        kv = self.c_latent(x).unsqueeze(1)  # (B, 1, T, ..)
        latent, k_rope = kv.split((self.n_latent, self.rope_dim), dim=-1)
        q_rope, k_rope = self.rotate(q_rope, ctx), self.rotate(k_rope, ctx)
        attention = self.expanded if ctx.cache is None else self.absorbed
        y = attention(q, q_rope, self.ln_latent(latent), k_rope, ctx)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(-2))

    def expanded(self, q, q_rope, latent, k_rope, ctx: Context) -> Tensor:
        """Attend with keys and values of every head, made from the latents."""
        kv = self.c_up(latent.squeeze(1)).unflatten(-1, (-1, 2 * self.head_dim)).transpose(1, 2)
        k, v = kv.chunk(2, dim=-1)  # (B, H, T, D)
        q, k = torch.cat((q, q_rope), dim=-1), torch.cat((k, k_rope.expand_as(q_rope)), dim=-1)
        return attend(q, k, v, ctx, self.dropout if self.training else 0.0)

    def absorbed(self, q, q_rope, latent, k_rope, ctx: Context) -> Tensor:
        """Attend to the cached latents: queries absorb the matrix to keys, outputs to values."""
        up_kv = self.c_up.weight.view(-1, 2 * self.head_dim, self.n_latent)
        up_k, up_v = up_kv.chunk(2, dim=1)  # (H, D, n_latent)
        latent, k_rope = ctx.cache.extend(latent, k_rope)
        q, k = torch.cat((q @ up_k, q_rope), dim=-1), torch.cat((latent, k_rope), dim=-1)
        scale = (self.head_dim + self.rope_dim) ** -0.5
        return attend(q, k, latent, ctx, 0.0, scale) @ up_v.mT


def swiglu(x: Tensor) -> Tensor:
    """Return the second half of the channels, gated by SiLU of the first (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def softcap(cap: float, logits: Tensor) -> Tensor:
    """Bound logits smoothly: cap * tanh(logits / cap)."""
    return cap * torch.tanh(logits / cap)


class Ahead(nn.Linear):
    """Hidden states for one token further ahead, x + SiLU(Linear(x)), initially x (2401.10774)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(super().forward(x))

    def init(self) -> None:
        nn.init.zeros_(self.weight)


# -----------------------------------------------------------------------------
# parts of a loop
class Diagonal(nn.Linear):
    """Injection decay * s + dt * B e; each channel's decay is in (0, 1) (Parcae, 2604.12946)."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.n_embd, bias=False)  # B
        self.A_log = nn.Parameter(torch.zeros(config.n_embd))
        self.dt_bias = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, s: Tensor, e: Tensor) -> Tensor:
        dt = F.softplus(self.dt_bias)
        decay = torch.exp(-dt * self.A_log.exp())
        return self.combine(decay * s, dt * super().forward(e))

    def combine(self, kept: Tensor, added: Tensor) -> Tensor:
        return kept + added

    def init(self) -> None:
        nn.init.eye_(self.weight)  # B
        nn.init.constant_(self.dt_bias, math.log(math.expm1(math.log(5) / 2)))  # decay sqrt(1/5)


class Orthogonal(Diagonal):
    """Diagonal that keeps of decay * s only what is orthogonal to dt * B e (IFM, 2610.06833)."""

    def combine(self, kept: Tensor, added: Tensor) -> Tensor:
        wide = torch.promote_types(kept.dtype, torch.float32)  # sums over C are not in bfloat16
        v, a = kept.to(wide), added.to(wide)
        along = (v * a).sum(-1, keepdim=True) / (a.square().sum(-1, keepdim=True) + 1e-6)
        return (v - along * a + a).type_as(kept)


class Add(Identity):
    """Injection s + e."""

    def forward(self, s: Tensor, e: Tensor) -> Tensor:
        return s + e


def add_share(share: float, s: Tensor, e: Tensor) -> Tensor:
    """Return s + share * e, what input_injection=residual does after each loop."""
    return s + share * e


class ZeroState(Identity):
    """First state 0."""

    def forward(self, e: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(e)


class NoiseState(nn.Module):
    """First state Gaussian: fresh noise in training; in eval the same in every call and row."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.std = small_std(config) * config.embedding_scale
        shape, seeded = (config.n_position, config.n_embd), torch.Generator().manual_seed(0)
        self.register_buffer("fixed", torch.randn(shape, generator=seeded), persistent=False)

    def forward(self, e: Tensor, ctx: Context) -> Tensor:
        if self.training:
            return self.std * torch.randn_like(e)
        return self.std * self.fixed[ctx.position].to(e.dtype).expand_as(e)


class HashState(NoiseState):
    """Noise of std sqrt(1 / C); in eval xLLM's hash, in all rows that of its row 0 (2610.06833)."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.std = config.n_embd**-0.5
        channel, place = torch.arange(config.n_embd), torch.arange(config.n_position)[:, None]
        hashed = 43758.5453123 * torch.sin(0.013579 * channel + 0.021713 * place + 0.123457)
        uniform = (hashed - hashed.floor()).clamp(1e-6, 1 - 1e-6)
        self.fixed = math.sqrt(2) * torch.erfinv(2 * uniform - 1)


class LoopNoise(nn.Module):
    """Noise on the first state in training, where the group loops more than once."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.std = config.loop_noise_scale * small_std(config)

    def forward(self, s: Tensor, n: int | Tensor) -> Tensor:
        return s + self.std * (n > 1) * torch.randn_like(s) if self.training else s


class LearnedIndex(nn.Embedding):
    """Adds one learned vector per loop; loops beyond max_loops share the last."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.max_loops, config.n_embd)

    def forward(self, s: Tensor, i: int | Tensor) -> Tensor:
        return s + self.weight[torch.as_tensor(i).clamp(max=self.num_embeddings - 1)]


class SinusoidalIndex(nn.Module):
    """Adds sines and cosines of the loop's number, times a learned gain per channel."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gain = nn.Parameter(torch.full((config.n_embd,), 0.02))

    def forward(self, s: Tensor, i: int | Tensor) -> Tensor:
        C = s.size(-1)
        frequencies = 10000.0 ** (-torch.arange(0, C, 2, device=s.device) / C)
        angles = (i.unsqueeze(-1) if isinstance(i, Tensor) else i) * frequencies
        return s + self.gain * torch.cat((angles.sin(), angles.cos()), dim=-1)


class NormExit(nn.Module):
    """The model's last norm, also after the last loop (Huginn)."""

    def __init__(self, config: GPTConfig, ln_f: nn.Module):
        super().__init__()
        self.shared = (ln_f,)  # in a tuple: its parameters stay transformer.ln_f's

    def forward(self, s: Tensor) -> Tensor:
        return self.shared[0](s)


class MeanStateGate(nn.Linear):
    """Logit (B, T, 1) of stopping after a loop, from the mean state of the tokens so far."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, 1)

    def forward(self, s: Tensor) -> Tensor:
        count = torch.arange(1, s.size(1) + 1, device=s.device)[:, None]
        return super().forward(s.cumsum(1) / count)


def geometric(mean: int, generator: torch.Generator) -> int:
    return int(torch.empty(1).geometric_(min(1 / mean, 1 - 1e-9), generator=generator))


def poisson(mean: int, generator: torch.Generator) -> int:
    """Draw 1 + Poisson(rate), rate log-normal of this mean (Huginn, arXiv 2502.05171, 3.2)."""
    sigma = 0.5
    rate = torch.empty(1).log_normal_(math.log(mean) - sigma**2 / 2, sigma, generator=generator)
    return 1 + int(torch.poisson(rate, generator=generator))


# -----------------------------------------------------------------------------
# inits: is_output is True of matrices whose outputs are added to the residual stream
def small_std(config: GPTConfig) -> float:
    """Return sqrt(2 / (5 C)), the unit of Huginn's inits and noise (arXiv 2502.05171)."""
    return math.sqrt(2 / (5 * config.n_embd))


def init_gpt2(config: GPTConfig, p: Tensor, is_output: bool) -> None:
    nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_physical) if is_output else 0.02)


def init_small(config: GPTConfig, p: Tensor, is_output: bool) -> None:
    """Draw from a normal distribution cut at 3 std, outputs less by effective depth (Huginn)."""
    std = small_std(config) / math.sqrt(2 * config.n_effective) if is_output else small_std(config)
    nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std)


def init_orthogonal(config: GPTConfig, p: Tensor, is_output: bool) -> None:
    """Draw an orthogonal matrix; outputs are 0, so that blocks start as the identity (Parcae)."""
    std = 0.0 if is_output else small_std(config)
    nn.init.orthogonal_(p, gain=std * math.sqrt(max(p.shape)))


# -----------------------------------------------------------------------------
# tables: the legal values of a field of the config, and what each stands for
def rmsnorm(config: GPTConfig, gain: bool = True) -> nn.Module:
    return nn.RMSNorm(config.n_embd, config.norm_eps or None, elementwise_affine=gain)


RMS = {"rmsnorm": rmsnorm, "weightless": partial(rmsnorm, gain=False)}
TABLES = {
    "norm": {"layernorm": lambda c: nn.LayerNorm(c.n_embd, c.norm_eps or 1e-5, bias=c.bias), **RMS},
    "norm_place": {"pre": "input", "post": "output", "branch": "input output", "sum": "input sum"},
    "position": ("learned", "rope", "none"),
    "attention": {"mha": Attention, "mla": LatentAttention},
    "qk_norm": {"none": Identity, "head": head_norm, "width": WidthNorm, "rotated": Identity},
    "mlp": {
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),  # as GPT-2 was released
        "relu2": lambda x: F.relu(x).square(),  # Primer, arXiv 2109.08668
        "swiglu": swiglu,
    },
    "input_injection": {  # (s, e) -> s, before the blocks
        "passthrough": Identity,
        "add": Add,
        "inject": Inject,
        "inject_bias": lambda config: Inject(replace(config, bias=True)),
        "diagonal": Diagonal,
        "orthogonal": Orthogonal,
        "residual": Identity,  # adds e after the blocks
    },
    "state_init": {"input": Identity, "zero": ZeroState, "noise": NoiseState, "hash": HashState},
    "loop_norm": {"none": Identity, **RMS},
    "loop_entry": {"none": Identity, "rmsnorm": rmsnorm},
    "loop_embedding": {"none": Identity, "learned": LearnedIndex, "sinusoidal": SinusoidalIndex},
    "loop_exit": {  # (config, ln_f), after the last loop
        "none": Identity,
        "linear": lambda config, ln_f: nn.Linear(config.n_embd, config.n_embd, bias=False),
        "final_norm": NormExit,
    },
    "exit_gate": {  # logit (B, T, 1) of stopping after a loop (Ouro, arXiv 2510.25741)
        "none": Identity,
        "state": lambda config: nn.Linear(config.n_embd, 1),
        "mean_state": MeanStateGate,
    },
    "loop_sampling": {  # (mean, generator) -> loops of a step
        "fixed": lambda mean, generator: mean,
        "uniform": lambda mean, rng: int(torch.randint(1, 2 * mean, (1,), generator=rng)),
        "geometric": geometric,
        "poisson": poisson,
    },
    "init": {"gpt2": init_gpt2, "small": init_small, "orthogonal": init_orthogonal},
}
LOOP_OFF = {"input_injection": "passthrough", "state_init": "input"}  # a loop of blocks alone
LOOP_OFF |= dict.fromkeys(("loop_norm", "loop_embedding", "loop_entry", "loop_exit"), "none")
LOOP_OFF |= {"loop_noise_scale": 0.0, "bptt_k": 0}


# -----------------------------------------------------------------------------
# checks of the config; those of several fields yield (field, legal, allowed)
def check_config(config: GPTConfig) -> None:
    """Raise ValueError that names the first field which is wrong, its value and what is allowed."""
    for field in fields(config):
        value = getattr(config, field.name)
        kinds = {float: (float, int), tuple: (tuple, list)}.get(field.type, field.type)
        legal = isinstance(value, kinds) and (field.type is bool or not isinstance(value, bool))
        require(config, field.name, legal, f"of type {field.type.__name__}")
        if field.type in (int, float):  # positive if the default is, else at least the default
            least = min(field.default, 1 if field.type is int else 1e-9)
            require(config, field.name, least <= value < math.inf, f"finite and at least {least}")
    for name, table in TABLES.items():
        require(config, name, getattr(config, name) in table, "one of " + ", ".join(table))
    for check in (check_shape, check_groups, check_loops):
        for name, legal, allowed in check(config):
            require(config, name, legal, allowed)


def require(config: GPTConfig, name: str, legal: bool, allowed: str) -> None:
    if not legal:
        raise ValueError(f"{name}={getattr(config, name)!r}: must be {allowed}")


def check_shape(c: GPTConfig) -> Iterator[tuple[str, bool, str]]:
    yield "dropout", c.dropout < 1, "at least 0 and less than 1"
    yield "label_shift_prob", c.label_shift_prob <= 1, "more than 0 and at most 1"
    yield "document_separator", c.document_separator < c.vocab_size, "-1 or a token id"
    if c.predict_ahead:  # its token before the window has no id
        alone = c.document_separator < 0 and not (c.value_embedding or c.attention_window)
        allowed = "False with document_separator, value_embedding or attention_window"
        yield "predict_ahead", alone, allowed
    yield "n_embd", c.head_size or c.n_embd % c.n_head == 0, f"a multiple of n_head={c.n_head}"
    yield "n_kv_head", c.n_head % (c.n_kv_head or 1) == 0, f"0 or a divisor of n_head={c.n_head}"
    if c.attention == "mla":
        plain = not (c.n_kv_head or c.qk_bias or c.value_embedding) and c.qk_norm == "none"
        yield "attention", plain, "mha with n_kv_head, qk_norm, qk_bias or value_embedding"
    if c.position == "rope":
        pairs = c.head_dim % (4 if c.attention == "mla" else 2) == 0
        yield "position", pairs, f"another one with heads of {c.head_dim} channels"
    yield "n_embd", c.n_embd % 2 == 0 or c.loop_embedding != "sinusoidal", "even for sinusoids"
    yield "rope_scaling", len(c.rope_scaling) in (0, 4), "() or four numbers"


def check_groups(c: GPTConfig) -> Iterator[tuple[str, bool, str]]:
    if c.n_prelude or c.n_coda:
        yield "n_block", c.n_block > 0, "at least 1 with a prelude or coda"
    yield "loop_groups", not (c.n_block and c.loop_groups), "() when n_block says what is looped"
    allowed = f"ascending runs of blocks below n_layer={c.n_layer}, as [[0,1],[3]]"
    last = -1
    for group in c.loop_groups:
        legal = isinstance(group, (tuple, list)) and all(type(block) is int for block in group)
        yield "loop_groups", legal and len(group) > 0, allowed
        consecutive = list(group) == list(range(group[0], group[0] + len(group)))
        yield "loop_groups", consecutive and last < group[0] and group[-1] < c.n_layer, allowed
        last = group[-1]


def check_loops(c: GPTConfig) -> Iterator[tuple[str, bool, str]]:
    n_groups = len(c.loop_groups) or int(c.n_block > 0)
    legal = len(c.loop_counts) in (0, n_groups)
    yield "loop_counts", legal, f"() or one count for each of {n_groups}"
    legal = all(type(n) is int and 1 <= n <= c.max_loops for n in c.loop_counts)
    yield "loop_counts", legal, f"counts from 1 to max_loops={c.max_loops}"
    yield "n_loop", c.n_loop <= c.max_loops, f"at most max_loops={c.max_loops}"
    if c.loop_counts or not n_groups:
        yield "n_loop", c.n_loop == 1, "1 where nothing is looped, or with loop_counts"
    yield "exit_gate", n_groups > 0 or c.exit_gate == "none", "none where nothing is looped"
    if c.input_injection == "passthrough":
        allowed = "used with state_init=input and bptt_k=0: else the prelude gets no gradient"
        yield "input_injection", c.state_init == "input" and not c.bptt_k, allowed

"""
Text from a model: token by token, each step another composition of the model's public pieces.
"""

import torch


class Cache:
    """What attention keeps of the tokens so far: a slot for each time that a forward pass attends, in that order."""

    def __init__(self, size):
        self.size, self.length, self.slots, self.turn = size, 0, [], 0

    def extend(self, *new):
        """Put parts (B, heads, T, channels) of new tokens into the slot whose turn it is; returns all that it holds."""
        if self.turn == len(self.slots):
            self.slots.append([part.new_empty(*part.shape[:2], self.size, part.size(-1)) for part in new])
        slot, end = self.slots[self.turn], self.length + new[0].size(2)
        for kept, part in zip(slot, new):
            kept[:, :, self.length : end] = part
        self.turn += 1
        return [kept[:, :, :end] for kept in slot]

    def look(self, x):
        """Position and mask of new tokens x (B, T, C): each sees itself and all before it."""
        place = torch.arange(self.length + x.size(1), device=x.device)
        position = place[-x.size(1) :]
        return position, position[:, None] >= place

    def advance(self, count):
        """The forward pass of count tokens is over."""
        self.length, self.turn = self.length + count, 0

    def bytes_per_token(self):
        """Of one row of the batch."""
        return sum(kept[0, :, 0].nbytes for slot in self.slots for kept in slot)


@torch.no_grad()
def generate(model, idx, max_new_tokens, *, n_loop=None, temperature=1.0, top_k=None, vocab_size=None, generator=None):
    """Continue the prompts idx (B, T), int64, by max_new_tokens tokens each.

    n_loop: loops of the model, as in GPT.forward. temperature: 0 takes the likeliest token, less than 1 is less
    random. top_k: draw from the k likeliest only. vocab_size: ids from here on are padding and never drawn.
    generator: a torch.Generator on the model's device. Only the last block_size tokens are looked at; up to there each
    is computed once. Returns (tokens (B, T + max_new_tokens), stats): stats["loops"], those of each group, and
    stats["cache_bytes_per_token"].
    """
    cache = Cache(model.block_size)
    for _ in range(max_new_tokens):
        logits = next_logits(model, idx, n_loop, cache)[:, :vocab_size].float()  # (B, V)
        idx = torch.cat((idx, choose(logits, temperature, top_k, generator)), dim=1)
    return idx, {"loops": model.config.counts(n_loop), "cache_bytes_per_token": cache.bytes_per_token()}


def next_logits(model, idx, n_loop, cache):
    """Logits (B, V) behind the last token; what the cache has not seen of idx (B, T) is computed."""
    if idx.size(1) > model.block_size or model.config.document_separator >= 0:  # positions move: all anew
        return model(idx[:, -model.block_size :], n_loop=n_loop)[0][:, -1]
    new = idx[:, cache.length :]
    logits = model(new, n_loop=n_loop, cache=cache)[0][:, -1]
    cache.advance(new.size(1))
    return logits


def choose(logits, temperature, top_k, generator):
    """One token (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, [-1]]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)

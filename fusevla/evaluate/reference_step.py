"""What a training step costs the way openpi writes it: the other side of ``bench_train.py``, never part of a run.

The same weights, losses, optimizer, dtypes and random draws as ``train.step``, hence the same numbers; what differs is the cost:
three cameras, one of them masked; text padded to 415 tokens; log-probabilities of all words at every text position against
one-hot targets; attention by einsums over the full mask; every layer recomputed in the backward pass. Written out here, so that
nothing that is done for the speed of ``model`` and ``losses`` makes the reference faster too: of the model it takes the weights,
norms, dense layers, embeddings and RoPE (openpi ``pi0.py``, ``gemma.py``, ``siglip.py``, ``scripts/train.py``@15a9616a).
"""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from fusevla.arrays import Array, Batch, Bool, Float, Int, Key
from fusevla.losses import draw_flow, flow_matching_loss, noisy_actions
from fusevla.model.fuse import Pi0Fuse, embed_actions, to_float, velocity
from fusevla.model.gemma import ExpertLayer
from fusevla.model.layers import Einsum, gated_residual
from fusevla.model.masks import attention_mask, positions
from fusevla.model.rope import apply_rope
from fusevla.model.siglip import SigLIP, VisionLayer
from fusevla.presets import TrainConfig
from fusevla.train.optim import make_optimizer
from fusevla.train.state import TrainState, step_key
from fusevla.train.step import augment_batch

TEXT = 415
MASKED_CAMERA = "right_wrist_0_rgb"
BLOCKED = -2.3819763e38


def reference_batch(batch: Batch, length: int = TEXT) -> Batch:
    """The same samples as openpi would see them: a black, masked camera more, and text padded to ``length``; NumPy."""
    observation = batch.observation
    size = len(batch.actions)
    black = np.zeros_like(next(iter(observation.images.values())))
    wide = lambda rows: np.pad(np.asarray(rows), ((0, 0), (0, length - rows.shape[1])))
    return Batch(
        observation=type(observation)(
            images={**observation.images, MASKED_CAMERA: black},
            image_masks={**observation.image_masks, MASKED_CAMERA: np.zeros(size, bool)},
            state=observation.state,
            tokens=wide(observation.tokens),
            token_mask=wide(observation.token_mask),
            token_ar_mask=wide(observation.token_ar_mask),
        ),
        token_loss_mask=wide(batch.token_loss_mask),
        diffusion_loss_mask=batch.diffusion_loss_mask,
        actions=batch.actions,
        action_is_pad=batch.action_is_pad,
    )


def reference_step(
    state: TrainState, frozen: Pi0Fuse, batch: Batch, *, config: TrainConfig, mask_padded_actions: bool = True
) -> tuple[TrainState, dict[str, Array]]:
    """As ``train.step.train_step``, with one flow draw and without an average of the weights."""
    augment_key, loss_key = jax.random.split(step_key(state))
    batch = augment_batch(batch, augment_key, config.augment)

    def loss_of(trainable: Pi0Fuse) -> Float[Array, ""]:
        return reference_loss(eqx.combine(trainable, frozen), batch, loss_key, config.diffusion_loss_coeff, mask_padded_actions)

    loss, grads = jax.value_and_grad(loss_of)(state.trainable)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, cast(Any, state.trainable))
    trainable = cast(Pi0Fuse, optax.apply_updates(cast(Any, state.trainable), updates))
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(trainable, opt_state, None, state.key, state.step + 1), metrics


def reference_loss(
    model: Pi0Fuse, batch: Batch, key: Key, coeff: float = 1.0, mask_padded_actions: bool = True
) -> Float[Array, ""]:
    """The batch loss of ``losses.joint_loss``, given its key."""
    flow = draw_flow(key, batch.actions)
    noisy, target = noisy_actions(flow, batch.actions)
    hidden, predicted = _forward(model, batch, noisy, flow.time)
    text = _text_loss(model, hidden, batch.observation.tokens, batch.token_loss_mask)
    action = flow_matching_loss(predicted, target, batch.action_is_pad if mask_padded_actions else None)
    return jnp.mean(text + coeff * action * batch.diffusion_loss_mask.astype(jnp.float32))


def _text_loss(
    model: Pi0Fuse, hidden: Float[Array, "b l d"], tokens: Int[Array, "b l"], loss_mask: Bool[Array, "b l"]
) -> Float[Array, " b"]:
    """Mean over each sample's targets of minus their log-probability, by way of all words at all positions."""
    targets = jax.nn.one_hot(tokens[:, 1:], model.config.vocab_size)
    logits = jnp.einsum("bld,vd->blv", hidden[:, :-1], model.embedder.table.astype(hidden.dtype))
    log_probability = jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
    wanted = loss_mask[:, 1:].astype(jnp.float32)
    return -jnp.sum(log_probability * wanted, axis=1) / jnp.maximum(jnp.sum(wanted, axis=1), 1.0)


def _forward(
    model: Pi0Fuse, batch: Batch, noisy: Float[Array, "b 1 h a"], time: Float[Array, "b 1"]
) -> tuple[Float[Array, "b l d"], Float[Array, "b 1 h a"]]:
    """The language expert's outputs for the text, and the velocities."""
    observation, dtype = batch.observation, model.config.dtype
    images = {name: _tower(model.vision, to_float(image), dtype) for name, image in sorted(observation.images.items())}
    text = model.embedder.embed(observation.tokens, dtype)
    prefix = jnp.concatenate([*images.values(), text], axis=1)
    seen = [jnp.repeat(observation.image_masks[name][:, None], x.shape[1], axis=1) for name, x in images.items()]
    ones = jnp.ones(noisy.shape[::2], bool)
    valid = jnp.concatenate([*seen, observation.token_mask, ones], axis=1)
    starts = jnp.broadcast_to(jnp.arange(ones.shape[1]) == 0, ones.shape)
    ar = jnp.concatenate([*(jnp.zeros_like(x) for x in seen), observation.token_ar_mask, starts], axis=1)

    stream = embed_actions(model, noisy, time)
    mask, where = attention_mask(valid, ar), positions(valid)
    block = _recomputed(lambda tokens, layers: _block(layers, tokens, stream.cond, mask, where))
    layers = (model.language.layers, model.action.layers)
    tokens, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), (prefix, stream.tokens), layers)
    hidden, _ = model.language.final_norm(tokens[0], None)
    actions, _ = model.action.final_norm(tokens[1], stream.cond)
    return hidden[:, -text.shape[1] :], velocity(model, actions, draws=1)


def _recomputed(function: Any) -> Any:
    return jax.checkpoint(function, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)


def _block(
    layers: tuple[ExpertLayer, ExpertLayer],
    tokens: tuple[Array, Array],
    cond: Array | None,
    mask: Array,
    where: Array,
) -> tuple[Array, Array]:
    """One layer of both experts around their attention."""
    conds = (None, cond)
    normed = [layer.pre_attention_norm(x, c) for layer, x, c in zip(layers, tokens, conds, strict=True)]
    heads = [_heads(layer, x) for layer, (x, _) in zip(layers, normed, strict=True)]
    query, key, value = (jnp.concatenate(parts, axis=1) for parts in zip(*heads, strict=True))
    query = apply_rope(query, where) * query.shape[-1] ** -0.5
    encoded = jnp.split(_attention(query, apply_rope(key, where), value, mask), [tokens[0].shape[1]], axis=1)
    outputs = []
    for layer, x, c, (_, gate), part in zip(layers, tokens, conds, normed, encoded, strict=True):
        x = gated_residual(x, _project(layer.out, part, "bsne,ned->bsd", "bsne,neL->bsL", "bsL,nLd->bsd"), gate)
        h, gate = layer.pre_ffw_norm(x, c)
        outputs.append(gated_residual(x, _feed_forward(layer, h), gate))
    return outputs[0], outputs[1]


def _project(part: Einsum, x: Array, base: str, down: str, up: str) -> Array:
    """``x W + scale (x A) B`` by the three einsums."""
    y = jnp.einsum(base, x, part.weight.astype(x.dtype))
    if part.adapter is None:
        return y
    low = jnp.einsum(down, x, part.adapter.a.astype(x.dtype))
    return y + jnp.einsum(up, low, part.adapter.b.astype(x.dtype)) * part.adapter.scale


def _heads(layer: ExpertLayer, x: Array) -> tuple[Array, Array, Array]:
    query = _project(layer.q, x, "bsd,nde->bsne", "bsd,ndL->bsnL", "bsnL,nLe->bsne")
    key, value = _project(layer.kv, x, "bsd,cmde->cbsme", "bsd,cmdL->cbsmL", "cbsmL,cmLe->cbsme")
    return query, key, value


def _feed_forward(layer: ExpertLayer, x: Array) -> Array:
    """The gelu branch and the other each by their own products, then the way down."""
    gating = layer.gating

    def branch(i: int) -> Array:
        adapter = gating.adapter
        low = None if adapter is None else eqx.tree_at(lambda a: (a.a, a.b), adapter, (adapter.a[i], adapter.b[i]))
        return _project(Einsum(gating.weight[i], low), x, "bsd,df->bsf", "bsd,dL->bsL", "bsL,Lf->bsf")

    hidden = jax.nn.gelu(branch(0), approximate=True) * branch(1)
    return _project(layer.linear, hidden, "bsf,fd->bsd", "bsf,fL->bsL", "bsL,Ld->bsd")


def _attention(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Logits and softmax in float32, the softmax of every query over every key."""
    grouped = rearrange(query, "b t (k g) h -> b t k g h", k=key.shape[2])
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, BLOCKED)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return rearrange(jnp.einsum("bkgts,bskh->btkgh", probabilities, value), "b t k g h -> b t (k g) h")


def _tower(tower: SigLIP, images: Float[Array, "b height width 3"], dtype: str) -> Float[Array, "b s d"]:
    """One camera through the image tower."""
    rows, columns = tower.patch.kernel.shape[:2]
    patches = rearrange(images, "b (y r) (x c) i -> b (y x) r c i", r=rows, c=columns)
    x = (tower.patch("bsrci,rcid->bsd", patches) + tower.position.astype(jnp.float32)).astype(dtype)
    block = _recomputed(_vision_block)
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, tower.layers)
    return tower.head(tower.norm(x))


def _vision_block(layer: VisionLayer, x: Array) -> Array:
    attn, normed = layer.attn, layer.norm1(x)
    query, key, value = (part("bsd,dne->bsne", normed) for part in (attn.query, attn.key, attn.value))
    x = x + attn.out("bsne,ned->bsd", _attention(query * query.shape[-1] ** -0.5, key, value, None))
    return x + layer.mlp(layer.norm2(x))

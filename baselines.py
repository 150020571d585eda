"""Rival training rules that several papers compare with.

`build_rival` gives a script's training loop the hooks of a method: a loss, a change of gradients
before the optimizer's step, something to do before an epoch. Plain joint training has none.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .errors import UserError
from .seeding import make_generator


class Rival(nn.Module):
    """Joint training without a change; base of the rivals.

    model: with `encoders`, modality -> encoder, and a `fusion` head; data: the training split, of
    which a rival may keep a part; config: the knobs of its name in `KNOBS`.
    """

    KNOBS = ()

    def __init__(self, model, data, num_classes, config):
        super().__init__()
        self.data = data

    def start_epoch(self, epoch, epochs, model, forward, build_optimizer, batches):
        """Called before every epoch; see `GradientBlending`."""

    def loss(self, logits, features, labels):
        """logits: (B, C) of the fusion head; features: modality -> (B, D); labels: (B,)."""
        return F.cross_entropy(logits, labels)

    def modulate(self, model, features, labels):
        """Called between backward and the optimizer's step."""


def auxiliary_losses(heads, logits, features, labels):
    """(M + 1,) cross-entropies: of a head on each modality's features, and of the fused logits."""
    alone = [head(features[m].float()) for m, head in heads.items()]
    return torch.stack([F.cross_entropy(x, labels) for x in [*alone, logits]])


class AuxiliaryCE(Rival):
    """A linear classifier on each modality's features; the sum of all the losses.

    weights: (M + 1,), in the order of `auxiliary_losses`: all 1 here.
    """

    def __init__(self, model, data, num_classes, config):
        super().__init__(model, data, num_classes, config)
        heads = {m: nn.Linear(encoder.dim, num_classes) for m, encoder in model.encoders.items()}
        self.heads = nn.ModuleDict(heads)
        self.register_buffer("weights", torch.ones(len(heads) + 1))

    def loss(self, logits, features, labels):
        return self.weights @ auxiliary_losses(self.heads, logits, features, labels)


class GradientBlending(AuxiliaryCE):
    """Gradient-Blending (Wang et al., CVPR 2020): auxiliary heads with estimated weights.

    A copy of the network is trained on each loss alone. A tenth of the training data is held out of
    all training, to see by how much a loss really fell. `offline` does so once, for all epochs;
    `online` every `super_epoch` epochs, from the present network.
    """

    KNOBS = ("blend", "super_epoch")

    def __init__(self, model, data, num_classes, config):
        super().__init__(model, data, num_classes, config)
        order = torch.randperm(len(data), generator=make_generator(config.seed, "held-out"))
        cut = max(1, len(data) // 10)
        if cut == len(data):
            raise UserError("G-Blending holds out a part of the training data; one is too few.")
        self.data, self.held_out = data.subset(order[cut:]), data.subset(order[:cut])
        self.super_epoch = config.super_epoch if config.blend == "online" else None

    def start_epoch(self, epoch, epochs, model, forward, build_optimizer, batches):
        """Estimate the weights if it is time to.

        forward: (network, inputs) -> float32 logits and features; build_optimizer: parameters ->
        optimizer; batches: (phase, epoch, optimizer) -> batches, having set the learning rate.
        """
        length = self.super_epoch or epochs
        if epoch % length:
            return
        gains, overfits = [], []
        for i in range(len(self.weights)):
            network, heads = copy.deepcopy((model, self.heads))
            optimizer = build_optimizer([*network.parameters(), *heads.parameters()])
            seen, unseen = self.measure(i, network, heads, forward)
            for step in range(epoch, min(epoch + length, epochs)):
                network.train()
                for inputs, labels, _ in batches("blend", step, optimizer):
                    optimizer.zero_grad()
                    auxiliary_losses(heads, *forward(network, inputs), labels)[i].backward()
                    optimizer.step()
            seen_after, unseen_after = self.measure(i, network, heads, forward)
            gains.append(unseen - unseen_after)
            overfits.append((unseen_after - seen_after) - (unseen - seen))
        if not all(map(math.isfinite, gains + overfits)):
            raise UserError("G-Blending's trial runs diverged; try a lower --lr.")
        self.weights.copy_(torch.tensor(blend_weights(gains, overfits)))

    @torch.no_grad()
    def measure(self, i, network, heads, forward):
        """Loss i of the training and of the held-out part, in evaluation mode."""
        network.eval()
        losses = []
        for split in (self.data, self.held_out):
            total = 0.0
            for inputs, labels, _ in split.batches(256):
                found = auxiliary_losses(heads, *forward(network, inputs), labels)[i]
                total += len(labels) * found.item()
            losses.append(total / len(split))
        return losses


def blend_weights(gains, overfits):
    """Weights of Gradient-Blending: w_i = G_i / O_i^2, normalised to a sum of 1.

    gains:    G_i, how much the held-out loss of head i fell between two checkpoints.
    overfits: O_i, how much the gap between held-out and training loss grew.
    A head that gained nothing gets no weight, and O counts as 1e-4 at least; if no head gained
    anything all weigh the same.
    """
    scores = [max(g, 0.0) / max(abs(o), 1e-4) ** 2 for g, o in zip(gains, overfits, strict=True)]
    total = sum(scores)
    return [score / total if total > 0 else 1 / len(scores) for score in scores]


class OGMGE(Rival):
    """OGM-GE (Peng et al., CVPR 2022): slow down the modality that is ahead, and add noise."""

    KNOBS = ("ogm_alpha",)

    def __init__(self, model, data, num_classes, config):
        super().__init__(model, data, num_classes, config)
        self.alpha = config.ogm_alpha

    @torch.no_grad()
    def modulate(self, model, features, labels):
        """Scale each encoder's gradients by k_m, and add Gaussian noise of their own size.

        Touches convolution kernels, as the authors' code does, or in an encoder without any the
        weight matrices; no biases, no BatchNorm, not the head. The noise is added in every
        modality, with the standard deviation of the unscaled gradient. The authors stop modulating
        half way through training; here it goes on to the end.
        """
        features = {m: z.float() for m, z in features.items()}
        factors = ogm_coefficients(model.fusion.unimodal_logits(features), labels, self.alpha)
        for m, encoder in model.encoders.items():
            kernels = [p for p in encoder.parameters() if p.dim() == 4]
            kernels = kernels or [p for p in encoder.parameters() if p.dim() == 2]
            for p in kernels:
                noise = torch.randn_like(p.grad) * (p.grad.std() + 1e-8)
                p.grad.mul_(factors[m]).add_(noise)


def ogm_coefficients(logits, labels, alpha):
    """k_m of OGM-GE: modality -> factor on its encoder's gradient.

    rho_m = (sum of the probabilities that modality m gives the true classes) / (that of the slowest
    other modality); k_m = 1 - tanh(alpha rho_m) where rho_m > 1, else 1.
    logits: modality -> (B, C), what each modality alone adds to the prediction.
    """
    scores = {
        m: x.softmax(dim=1).gather(1, labels.unsqueeze(1)).sum().clamp_min(1e-12)
        for m, x in logits.items()
    }
    factors = {}
    for m in scores:
        slowest = torch.stack([score for other, score in scores.items() if other != m]).min()
        rho = scores[m] / slowest
        factors[m] = torch.where(rho > 1, 1 - (alpha * rho).tanh(), 1.0)
    return factors


class ModalityDropout(Rival):
    """In a share of the training samples the fusion head sees zeros in place of one modality's
    features; which one is drawn at random."""

    KNOBS = ("drop_probability",)

    def __init__(self, model, data, num_classes, config):
        super().__init__(model, data, num_classes, config)
        self.probability = config.drop_probability
        model.fusion.register_forward_pre_hook(self.drop)

    def drop(self, fusion, arguments):
        """The features (modality -> (B, D)) that `fusion` gets in place of its own."""
        (features,) = arguments
        if not fusion.training:
            return None
        z = next(iter(features.values()))
        dropped = torch.rand(len(z), device=z.device) < self.probability
        victim = torch.randint(len(features), (len(z),), device=z.device)
        kept = [~(dropped & (victim == i)).unsqueeze(1) for i in range(len(features))]
        return ({m: z * keep for (m, z), keep in zip(features.items(), kept, strict=True)},)


RIVALS = {
    "aux-ce": AuxiliaryCE,
    "g-blending": GradientBlending,
    "ogm-ge": OGMGE,
    "modality-dropout": ModalityDropout,
}


def build_rival(model, data, num_classes, config):
    """The hooks of `config.method`; of a method that is no rival, those of joint training."""
    return RIVALS.get(config.method, Rival)(model, data, num_classes, config).to(config.device)


def check_rivals(methods, fusion, modalities):
    """UserError for OGM-GE where the logits are no sum of a part for each of several modalities."""
    if "ogm-ge" not in methods:
        return
    if len(modalities) < 2:
        raise UserError("ogm-ge compares modalities, and there is only one; leave it out.")
    if fusion not in ("concat", "sum"):
        raise UserError(
            f"ogm-ge needs each modality's share of the logits, and --fusion {fusion} does not "
            "have it; use --fusion concat."
        )


def rival_knobs(method):
    """Names of the arguments that decide a rival's result; none for another method."""
    return list(RIVALS.get(method, Rival).KNOBS)


class RUBi(nn.Module):
    """Cadene et al., NeurIPS 2019: a modality that answers alone masks the predictions in training.

        q = MLP(stop-gradient z);  L = sum of CE(logits * sigmoid(q), y) + weight * CE(W q + c, y)

    Where the biased modality is right alone, the masked loss is small, and so is what the network
    learns from that sample. Trained beside the network and left out at test time.
    dim: width D of the biased modality's features z (B, D).
    """

    def __init__(self, dim, num_classes, hidden=128):
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(dim, hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, num_classes),
        )
        self.classifier = nn.Linear(num_classes, num_classes)

    def forward(self, z, predictions, labels, weight=1.0):
        """z: (B, D); predictions: list of logits (B, C); labels: (B,). Returns the loss."""
        q = self.mlp(z.detach())
        masked = sum(F.cross_entropy(logits * q.sigmoid(), labels) for logits in predictions)
        return masked + weight * F.cross_entropy(self.classifier(q), labels)

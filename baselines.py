"""The rules of training that the papers compare with, on an encoder for each modality and a head.

    joint             one cross-entropy on the fused logits: "vanilla" or "naive" in the papers
    aux-ce            auxiliary cross-entropies, one on each modality's features
    g-blending        Gradient-Blending: auxiliary losses with estimated weights (Wang et al., 2020)
    ogm-ge            OGM-GE: slow the modality that is ahead, and add noise (Peng et al., 2022)
    modality-dropout  the head does without one modality now and then

    python baselines.py                                          # bundled digits, a minute on a CPU
    python baselines.py --dataset cg-mnist --method joint ogm-ge --seeds 0 1 2
    python -m experiments.compare --dataset digits --seeds 0     # beside the papers' own methods

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/baselines/<dataset>/<method>-<fusion>[-<knob>=<value>]-seed<k>/. See docs/baselines.md.

The PMR paper compares with g-blending, ogm-ge and a modality dropout (Table 2); the UMT paper names
g-blending and ogm-ge as rivals, its tables could not be read, nor which paper has auxiliary losses.

Differs from the papers:
- aux-ce has one linear head for each modality; the sum of all losses, all weights 1: ours. As in
  Gradient-Blending the fused head predicts alone: ours; PMR's release averages all heads.
- Gradient-Blending holds out a tenth of the training data and never trains on it; its weights sum
  to 1. A head that gained nothing has weight 0, a change of the gap counts as 1e-4 at least: ours.
- OGM-GE modulates to the end; its authors stop half way. For vectors the weight matrices take the
  place of the convolution kernels; of several modalities each is compared with the slowest: ours.
- OGM-GE needs a head that splits into modalities; PMR's variant of it for FiLM is not here.
- Modality dropout drops either modality of a sample, without rescaling: ours. PMR's DropPathway
  drops the audio pathway, for a whole iteration.
- Training settings are pmr.py's, alpha of OGM-GE its authors'; drop probability, `offline` and the
  super-epoch are ours.
"""

import copy
import math

from common.command_line import Command, Script, run_command
from common.device import forward
from common.errors import UserError
from common.evaluation import Totals, arrays, count_correct, measure, predict, probe_encoders
from common.flags import SHARE, SIZE, number
from common.metrics import count_parameters
from common.networks.multimodal import build_model, seed_module
from common.optimizer import build_optimizer
from common.run import Run
from common.seeding import make_generator

# isort: split
# ---- Method ----

import torch
import torch.nn as nn
import torch.nn.functional as F


class Joint(nn.Module):
    """L = CE(logits, y): the papers' vanilla training, and the base of the other rules.

    model: a network with `encoders`, modality -> encoder with the width `dim` of its features, and
    a `fusion` head; config: num_classes and the rule's own flags.
    """

    def __init__(self, model, config):
        super().__init__()

    def loss(self, logits, features, labels):
        """logits: (B, C) of the fusion head; features: modality -> (B, D); labels: (B,)."""
        return F.cross_entropy(logits, labels)

    def change_gradients(self, model, features, labels):
        """Called between `backward` and the optimizer's step."""


class AuxiliaryCE(Joint):
    """L = sum over m of w_m CE(W_m z^m + b_m, y), plus w CE(logits, y).

    All weights are 1; Gradient-Blending (Wang et al., CVPR 2020) estimates them, see
    `blend_weights` and `estimate`.
    """

    def __init__(self, model, config):
        super().__init__(model, config)
        self.heads = nn.ModuleDict(
            {m: nn.Linear(encoder.dim, config.num_classes) for m, encoder in model.encoders.items()}
        )
        self.register_buffer("weights", torch.ones(len(self.heads) + 1))

    def loss(self, logits, features, labels):
        return self.weights @ self.losses(logits, features, labels)

    def losses(self, logits, features, labels):
        """(M + 1,) cross-entropies: of the head of each modality, and of the fused logits."""
        alone = [head(features[m].float()) for m, head in self.heads.items()]
        return torch.stack([F.cross_entropy(x, labels) for x in [*alone, logits]])


def blend_weights(gains, overfits):
    """w_i = G_i / O_i^2, normalised to a sum of 1 (Wang et al., CVPR 2020).

    gains:    G_i, how much the held-out loss of head i fell between two checkpoints.
    overfits: O_i, how much the gap between held-out and training loss grew.
    A head that gained nothing gets no weight, and O counts as 1e-4 at least; if no head gained
    anything all weigh the same.
    """
    scores = [max(g, 0.0) / max(abs(o), 1e-4) ** 2 for g, o in zip(gains, overfits, strict=True)]
    total = sum(scores)
    return [score / total if total > 0 else 1 / len(scores) for score in scores]


class OGMGE(Joint):
    """OGM-GE (Peng et al., CVPR 2022): g_m <- k_m g_m + noise ~ N(0, std(g_m)^2), see
    `ogm_coefficients`. The loss is that of joint training."""

    def __init__(self, model, config):
        super().__init__(model, config)
        self.alpha = config.ogm_alpha

    @torch.no_grad()
    def change_gradients(self, model, features, labels):
        """Scale each encoder's gradients by k_m, and add Gaussian noise of their own size.

        Touches convolution kernels, as the authors' code does, or in an encoder without any the
        weight matrices; no biases, no BatchNorm, not the head. The noise is added in every
        modality, with the standard deviation of the unscaled gradient.
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
    """k_m: modality -> factor on its encoder's gradient.

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


class ModalityDropout(Joint):
    """z^m <- 0 for one modality m of a sample, drawn at random, with probability p; in training,
    and for the fusion head alone. The loss is that of joint training."""

    def __init__(self, model, config):
        super().__init__(model, config)
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


RULES = {
    "joint": Joint,
    "aux-ce": AuxiliaryCE,
    "g-blending": AuxiliaryCE,
    "ogm-ge": OGMGE,
    "modality-dropout": ModalityDropout,
}

# ---- Model ----

# `build_model` of common/networks: an encoder for each modality, and a head on their features.
FUSIONS = ("concat", "sum", "film", "gated", "mlp", "attention")

# ---- Training ----


def train(run, model, splits, config):
    """One loop for all rules; of a single modality plain training.

    `run.batches` sets the epoch's learning rate, `run.end_epoch` keeps the best on validation.
    """
    seed_module(config, config.method)
    rule = RULES.get(config.method, Joint)(model, config).to(config.device)
    data, held_out = splits.train, None
    if config.method == "g-blending":
        data, held_out = hold_out(splits.train, config)
    optimizer = build_optimizer([*model.parameters(), *rule.parameters()], config)
    state = {"model": model, "rule": rule, "optimizer": optimizer}
    span = config.epochs if config.blend == "offline" else config.super_epoch
    for epoch in run.epochs(state, samples=len(data)):
        if held_out and epoch % span == 0:
            last = min(epoch + span, config.epochs)
            weights = estimate(run, model, rule, data, held_out, range(epoch, last), config)
            rule.weights.copy_(torch.tensor(weights))
        totals = Totals(("loss", "accuracy"), config.device)
        model.train()
        for inputs, labels, _ in run.batches(data, optimizer):
            logits, features = forward(model, inputs, config)
            loss = rule.loss(logits, features, labels)
            optimizer.zero_grad()
            loss.backward()
            rule.change_gradients(model, features, labels)
            optimizer.step()
            totals.add(len(labels), loss, count_correct(logits, labels))
        training = totals.means()
        if held_out:
            training["weights"] = rule.weights.tolist()
        validation = measure(model, predict(model, splits.val, config), splits.val)
        run.end_epoch({"train": training, "val": validation})


# ---- The weights of Gradient-Blending ----


def hold_out(split, config):
    """The training data without a tenth, and that tenth, which no rule ever trains on."""
    order = torch.randperm(len(split), generator=make_generator(config.seed, "held-out"))
    cut = max(1, len(split) // 10)
    if cut == len(split):
        raise UserError("G-Blending holds out a part of the training data; one is too few.")
    return split.subset(order[cut:]), split.subset(order[:cut])


def estimate(run, model, rule, data, held_out, epochs, config):
    """Weights by trial runs: from the present network, one for each loss alone, over `epochs`.

    G_i and O_i of `blend_weights` compare the losses after with those before.
    """
    gains, overfits = [], []
    for i in range(len(rule.weights)):
        network, trial = copy.deepcopy((model, rule))
        optimizer = build_optimizer([*network.parameters(), *trial.parameters()], config)
        seen, unseen = (mean_loss(i, network, trial, x, config) for x in (data, held_out))
        for epoch in epochs:
            network.train()
            for inputs, labels, _ in run.shuffled(data, "blend", epoch, optimizers=[optimizer]):
                logits, features = forward(network, inputs, config)
                optimizer.zero_grad()
                trial.losses(logits, features, labels)[i].backward()
                optimizer.step()
        seen_after, unseen_after = (
            mean_loss(i, network, trial, x, config) for x in (data, held_out)
        )
        gains.append(unseen - unseen_after)
        overfits.append((unseen_after - seen_after) - (unseen - seen))
    if not all(map(math.isfinite, gains + overfits)):
        raise UserError("G-Blending's trial runs diverged; try a lower --lr.")
    return blend_weights(gains, overfits)


@torch.no_grad()
def mean_loss(i, network, rule, split, config):
    """Loss i over a split, in evaluation mode."""
    network.eval()
    total = 0.0
    for inputs, labels, _ in split.batches(256):
        logits, features = forward(network, inputs, config)
        total += len(labels) * rule.losses(logits, features, labels)[i].item()
    return total / len(split)


@torch.no_grad()
def test(run, model, splits, config):
    """The test split, looked at here only: by the best network on validation, and by the last."""
    run.restore({"model": model}, "best.pt")
    best = measure(model, predict(model, splits.test, config), splits.test)
    run.restore({"model": model}, "last.pt")
    outputs = predict(model, splits.test, config)
    last = measure(model, outputs, splits.test)
    for m, found in probe_encoders(lambda x: forward(model, x, config)[1], splits).items():
        last[m]["probe"] = found
    summary = run.summarize(last, best) | {"parameters": count_parameters(model)}
    lines = {"train": "train.accuracy", "validation": "val.accuracy"}
    return summary, arrays(outputs), {"accuracy (%)": lines}


# ---- Command line ----

# Those of pmr.py, where their sources are tagged, so that its method and these can be compared.
COMMON = {
    "batch_size": 64,
    "lr": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "step",
    "epochs": 100,
}
RECIPES = {
    "digits": {**COMMON, "epochs": 20, "lr": 0.01, "schedule": "none"},
    "av-digits": {**COMMON, "epochs": 20, "lr": 0.01},
    "synthetic": {**COMMON, "epochs": 30, "lr": 0.05, "schedule": "cosine"},
    "features": {**COMMON, "epochs": 20, "lr": 0.01, "schedule": "none"},
    **dict.fromkeys(("cg-mnist", "crema-d", "ave", "vggsound", "modelnet40"), COMMON),
}
METHODS = {  # and the flags that decide their results
    "joint": (),
    "aux-ce": (),
    "g-blending": ("blend", "super_epoch"),
    "ogm-ge": ("ogm_alpha",),
    "modality-dropout": ("drop_probability",),
    "unimodal": (),
}
COMPARED = ("joint", "aux-ce", "ogm-ge", "modality-dropout")  # g-blending trains M + 2 networks


def add_flags(add):
    alpha = {"type": SIZE, "default": 0.1, "metavar": "X"}  # its authors' command; elsewhere 0.8
    add("--ogm-alpha", **alpha, help="of ogm-ge (%(default)s)")
    share = {"type": SHARE, "default": 0.3, "metavar": "X"}
    add("--drop-probability", **share, help="p of modality-dropout (%(default)s)")
    kinds = {"choices": ["offline", "online"], "default": "offline"}
    add("--blend", **kinds, help="g-blending: once, or every super-epoch (%(default)s)")
    add("--super-epoch", type=number(int, 1), default=5, metavar="N", help="of online blending (5)")


def columns(modalities):
    """Columns of the table: title -> where the number stands in a summary.

    head: accuracy of a modality's share of the fused logits; probe: of a linear classifier trained
    anew on its frozen encoder.
    """
    found = {"test": "test.accuracy", "macro-F1": "test.macro_f1", "best": "best.test.accuracy"}
    for m in modalities:
        found |= {f"{m} head": f"test.{m}.head", f"{m} probe": f"test.{m}.probe"}
    return found


SCRIPT = Script("baselines", __doc__, METHODS, COMPARED, FUSIONS, RECIPES, add_flags)


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    command = Command(SCRIPT, argv)
    if "ogm-ge" in command.methods:
        if len(command.splits.modalities) < 2:
            raise UserError("ogm-ge compares modalities, and there is only one; leave it out.")
        if command.args.fusion not in ("concat", "sum"):
            raise UserError(
                "ogm-ge needs each modality's share of the logits, and --fusion "
                f"{command.args.fusion} does not have it; use --fusion concat."
            )
    summaries = []
    for config in command.configs():
        run = Run(config)
        if run.summary is None or config.eval_only:  # a finished run is reported, not trained again
            model = build_model(config, command.splits)
            if not config.eval_only:
                train(run, model, command.splits, config)
            run.finish(*test(run, model, command.splits, config))
        summaries.append(run.summary)
    return command.report(summaries, columns(command.splits.modalities))


if __name__ == "__main__":
    run_command(main)

"""The registry of findings: every code, what it means, and how to mend it.

The documentation page of each code, `bnfreeze explain CODE` and the check of codes in
`bnfreeze.findings.finding` are made from this list. To add a finding, add its entry here and call
`finding(code, ...)` in the place that detects it.

A code says first what it is about (``stats-``, ``affine-``, ``layer-``, ``model-``,
``optimizer-``) and then what is wrong with it. Codes that say so by themselves have no such
beginning: ``never-trained``, ``batch-stats-in-train``, ``train-undoes-eval``. Codes never change.
"""

from __future__ import annotations

from typing import Final

from bnfreeze.finding_kind import FindingKind, Level

__all__ = ["KINDS", "FindingKind", "Level"]

KINDS: Final[tuple[FindingKind, ...]] = (
    FindingKind(
        "affine-grad-left",
        ("warning",),
        "A parameter does not require grad, but still has a gradient",
        "Weight or bias has requires_grad=False, and its .grad is not None.",
        "An optimizer skips a parameter only if its .grad is None. The leftover gradient, and "
        "weight decay and momentum with it, are applied once more or at every step.",
        "Use freeze(model, 'affine'), which clears the gradient, or set .grad = None.",
        "loss.backward()\nbn.weight.requires_grad_(False)  # bn.weight.grad is still there\n"
        "optimizer.step()                 # moves bn.weight",
    ),
    FindingKind(
        "affine-thawed",
        ("warning",),
        "A frozen weight or bias requires grad again",
        "bnfreeze froze the parameter; something set requires_grad=True since.",
        "The next optimizer step changes it, although the policy promises that it stays.",
        "Call freeze again, after whatever sets the flag. Often that is "
        "model.requires_grad_(True) on the whole model.",
        "freeze(model, 'eval+affine')\nmodel.requires_grad_(True)  # thaws weight and bias",
    ),
    FindingKind(
        "batch-stats-in-train",
        ("warning", "note"),
        "The statistics are fixed, but train mode normalises with the batch",
        "The running statistics do not change, and in train mode the layer still uses the mean and "
        "variance of each batch. It is a note where you chose the policy 'stats'.",
        "Training and evaluation compute different functions. The weights adapt to the batches, "
        "and the results in eval mode can be much worse.",
        "If that is not what you want, use freeze(model, 'eval'): it normalises with the "
        "running statistics always.",
        "bn.momentum = 0                  # or bn.track_running_stats = False\n"
        "model.train()                    # still normalises with each batch",
    ),
    FindingKind(
        "batch-too-small",
        ("warning",),
        "Batches of this size are too small to normalise with",
        "In train mode a layer normalises with the mean of the batch. With so few samples that "
        "mean is off by more than 0.2 standard deviations in the median layer.",
        "The same sample gets another output in every batch, and the running statistics that are "
        "gathered from such batches are noisy. Frozen layers do not depend on the batch.",
        "Freeze the statistics, with freeze(model, 'eval'), once they fit the data; or use larger "
        "batches.",
        "report = bnfreeze.probe(model, loader)   # batches of 2\n"
        "report.layers[0].batch_noise             # in standard deviations",
    ),
    FindingKind(
        "dead-on-this-data",
        ("note",),
        "Channels that do not vary on this data",
        "On this data the input of some channels is constant, although a variance is stored for "
        "them.",
        "Nothing can be said about such a channel. Recalibrating gives it the variance 0: a later "
        "input that does vary is then multiplied by 1/sqrt(eps), which is about 300.",
        "Use more, and more varied, data; or leave the layer out with select=.",
        "bnfreeze.probe(model, loader).layers[0].dead_channels",
    ),
    FindingKind(
        "layer-eps-zero",
        ("warning",),
        "eps is 0",
        "The layer adds nothing to the variance before it divides by its square root.",
        "A channel whose variance is 0, or becomes 0 in half precision, gives NaN.",
        "Set the eps that the checkpoint was trained with, usually 1e-5.",
        "nn.BatchNorm2d(64, eps=0.0)",
    ),
    FindingKind(
        "layer-foreign",
        ("warning",),
        "A foreign norm layer: a module that keeps running statistics in a way of its own",
        "The module has a tensor running_mean or running_var, but is neither a subclass of torch's "
        "norm layers nor a frozen batch norm of another library.",
        "bnfreeze does not know what its forward does. A policy for the whole model leaves it "
        "alone, and its statistics may change in training and in eval mode.",
        "Name it in a rule: freeze(model, {'head.norm': 'eval'}) puts it in eval mode, and its "
        "forward works on copies of its statistics. Or watch it with guard(model, "
        "tensors='norm').",
        "class MyNorm(nn.Module):\n    def __init__(self, features):\n        super().__init__()\n"
        "        self.register_buffer('running_mean', torch.zeros(features))",
    ),
    FindingKind(
        "layer-inside-norm",
        ("warning", "note"),
        "A norm layer stands inside another norm layer",
        "The forward of the outer layer decides whether the inner one runs. It is a warning if the "
        "outer one is frozen in eval mode.",
        "In eval mode the inner layer may never run: timm's SplitBatchNorm2d then sends all of a "
        "batch through the outer layer.",
        "To go on with the inner layers, use the policy 'stats', which keeps the mode. Otherwise "
        "build the model without them.",
        "model = timm.layers.convert_splitbn_model(model)\nfreeze(model, 'eval')",
    ),
    FindingKind(
        "layer-lazy",
        ("warning",),
        "A lazy layer has not seen an input yet",
        "The layer is a LazyBatchNorm or LazyInstanceNorm. It has no tensors before its first "
        "forward pass.",
        "There is nothing to freeze yet.",
        "Run one forward pass before freezing.",
        "model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())\n"
        "model(images)                    # now it has tensors\nfreeze(model, 'eval')",
    ),
    FindingKind(
        "layer-not-reached",
        ("note",),
        "No data reached a norm layer",
        "The layer was not called in any batch, so nothing is known about its statistics.",
        "A part of the model that runs in training only, or on other inputs, is neither judged nor "
        "recalibrated.",
        "Run the model as you use it: pass forward=, or data that reach this layer.",
        "bnfreeze.probe(model, loader, forward=lambda model, batch: model.both_heads(batch))",
    ),
    FindingKind(
        "layer-unregistered",
        ("warning", "note"),
        "The model uses norm layers that it has not registered",
        "They are in a plain list, tuple, set or dict, or were set past nn.Module's own "
        "__setattr__. It is a note if they are in eval mode.",
        "Nothing that goes through the model reaches them: not freeze, guard, snapshot, "
        "state_dict, train() or to().",
        "Keep them in an nn.ModuleList or nn.ModuleDict. Or call freeze on them: "
        "freeze(model.teacher).",
        "self.norms = [nn.BatchNorm2d(8) for _ in domains]  # nn.ModuleList is needed",
    ),
    FindingKind(
        "model-averaged",
        ("note",),
        "Tensors differ by rounding alone, as an average does",
        "Of two checkpoints, some tensors differ by a few units of the last place, and in few of "
        "their elements. An exponential moving average (EMA) or a stochastic weight average (SWA) "
        "of values that did not change differs so from these values.",
        "It is a difference all the same: the bits are not equal, and the exit code is 1.",
        "If these tensors were frozen, compare the model itself, not its average (--key). To keep "
        "them equal, copy frozen tensors into the average.",
        "ema = 0.9999 * weight + (1 - 0.9999) * weight   # is not the weight, bit for bit",
    ),
    FindingKind(
        "model-no-norm-layer",
        ("note",),
        "There is no norm layer that keeps statistics",
        "The model has no batch norm and no instance norm with statistics; in a checkpoint no "
        "tensor is named running_mean or running_var.",
        "If you expected one, this may be the wrong model, the wrong file or the wrong key.",
        "If the model should have one, check that it is the right model, file or key. "
        "LayerNorm and GroupNorm keep no statistics: to freeze their weights, use the policy "
        "'weights'.",
        "inspect(nn.Linear(2, 2))",
    ),
    FindingKind(
        "model-nothing-trains",
        ("warning",),
        "No parameter of the model is left to train",
        "The policy 'weights' froze every parameter.",
        "loss.backward() fails: no parameter requires grad.",
        "Leave out what shall train, for example the head: {'**': 'eval+weights', 'fc': 'none'}.",
        "freeze(model, 'eval+weights')                            # nothing trains\n"
        "freeze(model, {'**': 'eval+weights', 'fc': 'none'})      # fc trains",
    ),
    FindingKind(
        "never-trained",
        ("warning",),
        "The statistics are those of a new layer",
        "Every running mean is 0, every variance is 1, and no batch was counted.",
        "With these values a frozen layer normalises nothing: it is the identity, apart from "
        "weight and bias.",
        "Load the pretrained weights before freezing, or leave this layer out. To measure whether "
        "statistics fit your data, call bnfreeze.probe(model, loader).",
        "model = resnet50()               # no weights loaded\nfreeze(model, 'eval')",
    ),
    FindingKind(
        "optimizer-has-frozen",
        ("note", "warning"),
        "A frozen parameter is in the optimizer",
        "The optimizer was built with parameters that are frozen. It is a warning for LBFGS.",
        "Most optimizers skip a parameter whose .grad is None, so this is harmless. LBFGS does "
        "not: it moves all its parameters along its past steps.",
        "Freeze first, then build the optimizer from the parameters that have requires_grad=True.",
        "freeze(model, 'eval+affine')\n"
        "optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)",
    ),
    FindingKind(
        "optimizer-without-parameters",
        ("warning",),
        "The optimizer has none of the model's parameters",
        "No parameter in the optimizer's groups is a parameter of this model.",
        "Its steps change nothing in the model. Usually the optimizer was built for another copy "
        "of the model, or before the model's parameters were replaced.",
        "Build the optimizer from this model's parameters, after every step that replaces them.",
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "model = copy.deepcopy(model)     # has other parameters",
    ),
    FindingKind(
        "runs-code",
        ("error", "warning", "note"),
        "Loading the file would run code",
        "The file names functions or classes that torch.load(weights_only=False) or pickle.load "
        "would call. It is an error for what Python, torch, NumPy and other known packages have, "
        "and for what the file makes up while it is loaded; a warning for a package of which "
        "bnfreeze knows nothing, such as a script's own Config; a note for the classes of a model "
        "that was saved whole. What training scripts usually save beside the weights "
        "(argparse.Namespace, paths, dates, numbers) is not mentioned.",
        "The author of the file decides what such a call does on your machine. bnfreeze calls "
        "nothing of it, and says so of no file that it is safe.",
        "Load it with weights_only=True, or only if you trust its author. Save the values alone: "
        "torch.save(model.state_dict(), 'weights.pt').",
        "torch.save({'state_dict': state, 'config': Config()}, 'a.pt')\n"
        "$ bnfreeze inspect a.pt           # warns of Config",
    ),
    FindingKind(
        "stats-count-missing",
        ("note",),
        "A stored layer has no num_batches_tracked",
        "It is a frozen batch norm, as torchvision, detectron2, timm and Transformers have them, "
        "or a checkpoint from before torch 0.4.1.",
        "Loading it into a plain batch norm with strict=True may report a missing key.",
        "Nothing to do: such statistics load into a frozen layer as they are.",
        "torchvision.ops.FrozenBatchNorm2d(64).state_dict()",
    ),
    FindingKind(
        "stats-count-mixed",
        ("note",),
        "Some stored layers counted another number of batches than the rest",
        "num_batches_tracked differs between the layers of one model.",
        "Some layers were frozen while others were trained, or came from another checkpoint. An "
        "accident looks the same.",
        "If you froze a part of the model, this is as expected. Otherwise find out which layers "
        "were not trained.",
        "bnfreeze inspect model.pt --sort batches",
    ),
    FindingKind(
        "stats-dtype",
        ("warning",),
        "The statistics are kept below float32",
        "running_mean or running_var is float16, bfloat16 or float8.",
        "Rounded statistics make a coarser layer than the one that was trained. On a ResNet-50 in "
        "bfloat16 this made the error of the output about seven times as large.",
        "Keep statistics in float32: convert the model first, then load the checkpoint into "
        "float32 statistics.",
        "model.bfloat16()                 # rounds running_mean and running_var, too",
    ),
    FindingKind(
        "stats-missing",
        ("warning",),
        "The layer keeps no running statistics",
        "It was built with track_running_stats=False.",
        "There are no statistics to freeze, and it normalises with the batch in eval mode, too.",
        "Build it with track_running_stats=True and load statistics, or leave it as it is.",
        "nn.BatchNorm2d(64, track_running_stats=False)",
    ),
    FindingKind(
        "stats-nonfinite",
        ("error",),
        "The statistics contain NaN or infinity",
        "At least one running mean or variance is not a finite number.",
        "Everything that the layer computes from it is NaN.",
        "Training diverged, or the file is damaged: go back to an earlier checkpoint.",
        "bnfreeze inspect run/*.ckpt --plain | grep stats-nonfinite",
    ),
    FindingKind(
        "stats-not-frozen",
        ("warning", "note"),
        "Weight and bias stay, but the running statistics change",
        "Weight and bias do not train, and each forward pass in train mode still updates the "
        "running statistics. In a comparison of two checkpoints: weight and bias are "
        "bit-identical, and the statistics are not. It is a note where your policy says so.",
        "The layer looks frozen and is not: its output in eval mode changes. Statistics are "
        "buffers, which no optimizer and no requires_grad keeps from changing.",
        "Use freeze(model, 'eval'), or 'eval+affine' to freeze weight and bias as well.",
        "for p in model.parameters():\n    p.requires_grad_(False)\n"
        "model.train()\nmodel(images)                    # running_mean changes",
    ),
    FindingKind(
        "stats-not-updated",
        ("warning",),
        "Batches were counted, but the statistics are those of a new layer",
        "Every running mean is exactly 0 and every variance exactly 1, although "
        "num_batches_tracked is above 0.",
        "Real data never gives exactly these values. The statistics were reset after training, or "
        "they never changed (momentum 0), or the layer's input was always 0. In eval mode the "
        "layer normalises nothing.",
        "Load the statistics of an earlier checkpoint, or call bnfreeze.recalibrate(model, loader) "
        "before you freeze. bnfreeze.probe(model, loader) says how far off they are.",
        "bn.momentum = 0                  # counts batches, and never updates the statistics",
    ),
    FindingKind(
        "stats-shifted",
        ("warning", "note"),
        "The stored statistics do not fit this data",
        "More than 5 % of the layer's channels have, on this data, a mean that is off by more than "
        "0.15 standard deviations, or a variance that is off by more than a factor of 1.35, and "
        "this is not by chance. It is a note for a layer that fits once the layers before it "
        "normalise their inputs: the shift is carried to it.",
        "In eval mode, and frozen, the layer normalises with values that are not this data's. "
        "Often that alone explains bad results in eval mode.",
        "Recalibrate before you freeze: recalibrate(model, loader, score=...) replaces the "
        "statistics and says whether it helped.",
        "print(bnfreeze.probe(model, loader))\n"
        "bnfreeze.recalibrate(model, loader)\n"
        "bnfreeze.freeze(model, 'eval+affine')",
    ),
    FindingKind(
        "stats-unpaired",
        ("warning",),
        "Stored statistics that no norm layer keeps in this way",
        "A checkpoint has one of running_mean and running_var without the other, or their shapes "
        "do not fit each other.",
        "Loading with strict=True fails where a norm layer is expected.",
        "Get the whole checkpoint, or correct the program that converted it.",
        "{'bn.running_mean': torch.zeros(4)}  # and no bn.running_var",
    ),
    FindingKind(
        "stats-unread",
        ("warning",),
        "The stored statistics could not be read as numbers",
        "They have a dtype that bnfreeze does not read as numbers (complex, quantised), or were "
        "saved without values.",
        "Nothing is known about these values: no other finding looked at them.",
        "Convert the statistics to float32 to have them checked.",
        "state['bn.running_var'] = state['bn.running_var'].to('meta')",
    ),
    FindingKind(
        "stats-var-nonpositive",
        ("error", "warning"),
        "A running variance is negative, or 0",
        "A negative variance is an error; a variance of exactly 0 is a warning.",
        "A negative variance gives NaN: some program changed it when it converted the "
        "checkpoint. A variance of 0 is a channel that never varied: any signal in it is "
        "multiplied by 1/sqrt(eps), 316 for the usual eps.",
        "Negative: use the original checkpoint, before it was converted. Zero: check what the "
        "channel's input is; a channel that never varied cannot be normalised.",
        "bnfreeze inspect converted.pth --sort var",
    ),
    FindingKind(
        "stats-var-tiny",
        ("warning",),
        "Stored variances become 0 in half precision",
        "Some running variances are below 2**-25, the least that float16 can show.",
        "In float16 they are 0, and the channel is multiplied by up to 1/sqrt(eps).",
        "Keep the statistics in float32, and eps at the value that the checkpoint was trained "
        "with.",
        "model.half()                     # such variances are 0 now",
    ),
    FindingKind(
        "too-few-samples",
        ("note",),
        "Too few samples to say whether the statistics fit",
        "With so few samples, differences as large as those that matter arise by chance.",
        "Neither that the statistics fit nor that they do not is shown.",
        "Probe with more samples. Pixels of one image do not count as samples.",
        "bnfreeze.probe(model, loader, max_batches=64)",
    ),
    FindingKind(
        "train-undoes-eval",
        ("warning",),
        "The layer is in eval mode now, and the next model.train() ends that",
        "The model is in train mode and this layer in eval mode, because eval() was called on it "
        "once.",
        "Training loops call model.train() at each epoch. From then on the layer normalises with "
        "the batch and updates its statistics.",
        "Use freeze(model, 'eval'), which model.train() does not undo.",
        "for m in model.modules():\n    if isinstance(m, nn.BatchNorm2d):\n        m.eval()\n"
        "model.train()                    # all in train mode again",
    ),
)

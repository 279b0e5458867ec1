"""What run.py puts together. Imports every folder but tuples.

Before anything is loaded:
    refusal.py       what a user reads when a run is refused
    preflight.py     every problem that can be found without loading a weight
    recipes.py       how each dataset is trained: its losses, negatives, temperature
    steps.py         the order of the data, and how many steps they make
    identity.py      what a resume must find unchanged
    continuing.py    what has changed since the run began that is to continue

Before the first step:
    setup.py         everything that the loop needs, put together
    models.py        model and teacher: loaded, given adapters, tried, on their device
    kernels.py       torch.compile and Liger's kernels
    advice.py        what is trained, and what a person may not have meant

A step:
    step.py          one optimizer update
    objective.py     its losses, over all processes
    two_pass.py      the same gradient from several forward passes
    schedule.py      its learning rate
    reports.py       its gradient norm, read without waiting for the device
    meter.py         sums of losses and of work, from one log line to the next

What fits into memory:
    activations.py   which activations are kept, as asked or chosen
    policy.py        the choice: the fastest way that fits
    memory.py        bytes of weights, gradients, activations
    loss_memory.py   bytes of the losses
    step_time.py     seconds of a step

What a run leaves behind:
    console.py       its lines on the screen
    records.py       metrics.jsonl, timings.jsonl, manifest.json
    trackers.py      TensorBoard, Weights & Biases, trackio
    plot.py          a picture of its curves
    folders.py       after which steps there is a model folder
    card.py          what a model folder says about the run
    evaluation.py    search in retrieval sets while it trains
    best.py          which model is the best, and when to end early
"""

"""The numbers that scheduling depends on, each with its unit and its reason.

Costs are in passes: runs of the trunk for one image. A ratio has no unit.
"""

from typing import Final

# --- Admission

# Ratio. The default of deadline_margin: estimates miss by some, and an answer that comes too late is work for nothing.
DEADLINE_MARGIN: Final = 1.5
# Ratio. The most that the margin is raised to, where estimates miss by more: what may wait must last while a batch is computed.
MAX_DEADLINE_MARGIN: Final = 2.5
# Ratio. The part of the jobs that may come later than the margin says.
LATE_SHARE: Final = 0.01
# Ratio. One that does raises the margin so much: a late batch, whose jobs are all late, makes itself felt at once.
MARGIN_STEP: Final = 0.05
# Ratio to a job's deadline. Only of jobs that are expected to take so much of it, margin and all, does the margin learn.
MARGIN_FROM: Final = 0.5
# Seconds. A job of a kind that was not computed for so long is let in despite its estimate: only computing can correct an estimate.
TRIAL_SECONDS: Final = 2.0
# Ratio. A caller holds at most so many times what would be left free, so that others find room while it sends as much as it can.
MAX_SHARE_OF_FREE: Final = 8
# Ratio. A refused caller is told to come back when this part of what there is to do will be done.
RETRY_SHARE: Final = 0.5
# Seconds. The shortest wait that a refused caller is told, so that it does not come back at once.
MIN_RETRY_SECONDS: Final = 0.05

# --- Turns

# Full batches. How far a caller who comes back after a pause may be behind those who never paused, in what it has had.
CREDIT_BATCHES: Final = 2.0
# Ratio to the bound on pending work. The same among jobs in the background, if it is more: they cost more.
BACKGROUND_CREDIT: Final = 0.25
# Callers. Beyond so many, those without jobs are forgotten: anybody can make up names, and each takes memory.
MAX_CALLERS: Final = 1024

# --- Batches

# Passes. A job that costs more shares no batch: its inner work fills the device, and alone it can end early.
LIGHT_COST: Final = 4.0
# Ratio. A batch takes at most this part of the time that any of its callers gave: what waits behind it has deadlines, too.
MAX_BATCH_SHARE: Final = 0.5
# Ratio. A batch that begins with the job of a caller who has had little takes at most so many times what that job takes alone.
MAX_BATCH_STRETCH: Final = 1.5

# --- Memory

# Full batches. So many are computed before a lowered ceiling is raised, and twice as many each time that it is lowered again.
RAISE_AFTER_BATCHES: Final = 64
# Full batches. The most that it may come to: another program may have had the memory, and have given it back.
MAX_RAISE_AFTER_BATCHES: Final = 4096
# Ratio. What is added to a ceiling at a time; little, since a batch that is too large is computed twice.
CEILING_GROWTH: Final = 0.25

# --- Preemption

# Ratio. A batch that others interrupt proceeds at this part of its speed at least: it has deadlines, too.
MIN_SPEED: Final = 0.25
# Ratio. A job interrupts a batch that is not light if it is so many times cheaper: it delays the batch by little.
MIN_COST_RATIO: Final = 8.0
# Batches. Interruptions within interruptions: the memory of all of them is held at once.
MAX_DEPTH: Final = 3
# Seconds. A batch in the background that pauses looks so often whether its callers still wait.
PAUSE_SECONDS: Final = 0.1

# --- Estimates

# Ratio. The newest batch's weight in a running mean: a lasting change shows after some batches, a single outlier hardly.
NEWEST_WEIGHT: Final = 0.2
# Ratio. A batch that took longer counts as so many times its estimate: a machine that stalled once is not so much slower now.
MAX_SLOWDOWN: Final = 4.0
# Estimates that are kept until the next batch: costs are as many as there are sets of methods and targets.
MAX_ESTIMATES: Final = 1024
# Ratio to the time computed so far. The least that a batch still takes: one that is late will be later.
OVERRUN: Final = 0.25

# --- Threads

# Nice value, on Linux. On a CPU that is busy with computing the event loop must still run at once, to refuse for example.
NICENESS: Final = 10
# Seconds. How often it is asked, when closing, whether the threads have ended.
CLOSE_POLL_SECONDS: Final = 0.01

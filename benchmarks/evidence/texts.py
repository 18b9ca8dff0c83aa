"""What the page of evidence says: its tasks and the comparisons beside them, and what is read from their tables."""

from dataclasses import dataclass, field


@dataclass
class Task:
    """``choice_seeds`` and ``seeds`` are those of the plan; ``more`` has, by the end of its folder's name, what a
    comparison beside the task's adds to its heading, and what is said about it."""

    heading: str
    about: str
    choice_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    more: dict[str, tuple[str, str]] = field(default_factory=dict)


TASKS = {
    "slots": Task(
        "Slots of SNIPS, from scratch",
        "Words in, a tag a word out: segmentation of text, literally. A Llama of 0.7 million weights that has seen "
        "nothing, 200 steps of 32 sentences, less than half an epoch. Right are all spans of a sentence with their "
        "labels (exact match); F1 is that of the spans. The rates 4.5e-3 and 6e-3 were added after the first final "
        "runs, as all objectives had preferred the higher of two.",
        (0,),
        tuple(range(1, 9)),
        {
            "_chosen": (
                ": the best of its screen",
                "The five best losses of the screen, with fresh seeds and on the test rows, each at its own rate.",
            ),
            "_long": (
                ": four times as long",
                "800 steps, nearly two epochs, with fresh seeds: is a gain one of short training? All at one rate, a "
                "good one for each at 200 steps.",
            ),
            "_large": (
                ": a model four times as large",
                "2.8 million weights, 256 wide in place of 96, with fresh seeds, all at one rate.",
            ),
        },
    ),
    "slots_further": Task(
        "Slots of SNIPS, from a model of other intents",
        "Pretraining in small: the Llama of the first task after 800 steps of cross-entropy on four of the seven "
        "intents, then trained for 60 steps of 32 sentences of the three others, with tags of which it has seen some. "
        "The rate 9e-3 was added after the first five final runs, as the losses preferred the highest of three.",
        (0,),
        tuple(range(1, 9)),
        {
            "_scratch": (
                ": the same three intents from scratch",
                "Is it the start, or are these sentences others? The same rows, 200 steps from a model that has seen "
                "nothing, all at one rate.",
            ),
        },
    ),
    "problems": Task(
        "Word problems, from scratch",
        "The problems of `make demo`: question in, formulas and `#### number` out. A Llama of 0.6 million weights that "
        "has seen nothing, 300 steps of 64 problems. Right is the number. The rate 4.5e-3 and two of the three choice "
        "seeds were added after the first final runs, as one seed alone moves the score of a rate by ten points.",
        (0, 9, 10),
        tuple(range(1, 9)),
        {
            "_others": (
                ": what gains on slots",
                "Two of the losses that gain on slots, on the problems kept back, at the rate of cross_entropy and "
                "beside the same runs of it as above. They were trained after focal and topk_cross_entropy had been "
                "published as a table of their own (spherical_z had been meant to be with them, and there was no "
                "time). With all four in one table Holm's correction would make the p-value of focal 0.068 and that "
                "of weighted_cross_entropy 0.099: neither would be decided.",
            ),
            "_again": (
                ": what is barely decided, once more",
                "Eight fresh seeds on the same rows, for the two of which the tables above just so decide that they "
                "are better. Each was planned in a commit before it ran, and these seeds decide alone: none are "
                "pooled.",
            ),
            "_long": (
                ": three times as long",
                "900 steps, with fresh seeds, all at one rate. There is nothing left to gain by then.",
            ),
        },
    ),
    "intents": Task(
        "Long-tailed intents, from scratch",
        "A sentence in, one of seven names out; one token an answer, so a set is a micro-batch. Of 2,786 training rows "
        "the most frequent name has 1,500 and the rarest 15; the test rows have all nearly alike, so exact match "
        "counts rare names as much as frequent ones. The small Llama, 200 steps of 32 sentences. What is gained is "
        "nearly always one name, the second rarest; the tables by intent say so, and what is left of it where test "
        "rows are as frequent as training rows. The rate 9e-3 was added after the final runs, as cross_entropy had "
        "preferred the highest of three.",
        (0,),
        tuple(range(1, 9)),
        {
            "_long": (
                ": four times as long",
                "800 steps, with fresh seeds, all at one rate: is this, too, a gain of short training?",
            ),
            "_chosen": (
                ": the best of its screen",
                "The five best losses of the screen, as they were best there, with fresh seeds and on the test rows. "
                "The mix of `topk_cross_entropy 0.8` is 0.2 of cross-entropy and 0.8 of it, a set a document, which is "
                "a name and its end; `focal gamma 5` is 0.4 of it with that gamma, `label smoothing` 0.2 of "
                "cross-entropy with label_smoothing 0.1. The rate 1.5e-3 was added after the final runs, as "
                "cross_entropy had preferred the lowest of three.",
            ),
            "_others": (
                ": the name alone",
                "`topk_cross_entropy alone`, weight 1, is the cross-entropy of the harder one of the two tokens of an "
                "answer, its name and its end, nearly always of the name: does topk_cross_entropy gain as the end "
                "counts less? And spherical_z, which gains on slots. Beside the runs of cross_entropy above.",
            ),
        },
    ),
    "intents_pretrained": Task(
        "Long-tailed intents, pretrained",
        "Sentences and names as text, with SmolLM2-135M-Instruct, all weights trained, 60 steps of 8. Of the seven "
        "names, of two to four tokens, the rarest is in 15 of 2,786 training rows, of which a run sees 480; the test "
        "rows have all alike. Sets are micro-batches. The weights come from a file with 4 bits each.",
        (0,),
        (1, 2, 3),
        {
            "_more": (
                ": the paper's losses, and more seeds",
                "The same rows and steps in bfloat16 (autocast), which is faster, with lower rates. The rate explains "
                "much of the differences: four losses have the lower one, at which cross_entropy, too, has less.",
            ),
        },
    ),
    "slots_text": Task(
        "Slots as text, pretrained",
        "A sentence in, `artist: westbam; album: allergic` out, with SmolLM2-135M-Instruct, all weights trained, 100 "
        "steps of 8 of 640 sentences. Right are all slots of a sentence; F1 is that of the slots. All at one rate, "
        "between two that were level in a trial of cross_entropy; the weights come from a file with 4 bits each.",
        (0,),
        (1, 2, 3),
    ),
}
INTRODUCTION = """# Evidence

Does another objective than cross-entropy help? Made with `cvloss compare` ([how it works](compare.md)): where several
rates are tried, each objective has its own chosen on validation rows with seeds of their own; then it is trained with
fresh seeds, and scored on other rows. The first table of a task and that of data kept back have rows on which no
objective had been chosen; other comparisons have the same rows, for losses that the tables before had singled out. The
lines of all runs are in `benchmarks/evidence/results`, and this page is written from them; how to make them again says
[benchmarks/evidence](../benchmarks/evidence/README.md). If nothing else is said, a mix is 0.6 of cross-entropy and 0.4
of the other loss, and `k` of topk_cross_entropy is 0.3.
"""
READING = """**What gains is short training from scratch, on slots and on long-tailed intents.** Four losses gain on
slots, three of them on intents too, where the fourth, sparsemax, is not decided, and where the gain is nearly always
one rare intent of seven; two of them gain on slots in a model four times as large, too. After four times the steps, on
slots as on intents, no difference of topk_cross_entropy and weighted_cross_entropy to cross_entropy could be detected,
as if they got there sooner, not further. From a model that has learned other intents, in 60 steps, none of the four
gains, and topk_cross_entropy loses; on the same sentences from scratch, in 200 steps, both that were tried gain
(topk_cross_entropy 5.4 points, weighted_cross_entropy 2.8). On word problems focal and weighted_cross_entropy were
better with eight seeds, by nearly five points, and undecided, by about three, with eight others; sparsemax loses;
after three times the steps cross_entropy and focal both have 99.9 %. With a pretrained language model nothing is
decided: on intents, with eight seeds, six losses, the paper's among them, are within 2.2 points of cross_entropy at
the same rate; on slots as text, with three, the three that were tried were all below it. You may gain if you train
from scratch with few steps; for fine-tuning, nothing here speaks for another objective than cross-entropy.
"""
EXPLAINED = """## Where the losses pull

We had supposed that topk_cross_entropy gains as it leaves easy tokens out, that focal does the same softly, and that
lovasz and dice hardly differ from cross-entropy. One training with cross_entropy a task, at 3e-3; on the way, at the
steps of the tables, each loss alone had its gradient taken on the same four micro-batches. What the figures show of
the tasks from scratch:

- Pulling on hard tokens is not enough to gain. focal has more of its pull on tokens with p < 0.5 than cross_entropy,
  and at half of the training and at its end more than topk_cross_entropy has; on slots it is not told from
  cross_entropy, though on word problems it may gain.
- On slots the four that gain are, of the losses with a gradient worth mentioning there, those whose gradient has
  another direction at the start, when no token is easy yet:
  the cosines of topk_cross_entropy, weighted_cross_entropy and sparsemax with cross_entropy are below 0.7, that of
  spherical_z falls to 0.8. focal and aldr, not decided, have its direction at the first two points; at the third aldr
  has left it as far as spherical_z. From half of the training on all of them but spherical_z lie near to it, and
  topk_cross_entropy has then about 1 / k times its length, as the hardest tokens have most of its gradient anyway.
  Length alone should do little: AdamW divides by it, and gradients above 1 are cut to 1 here. This was seen in one
  training, after it was known which losses gain.
- lovasz, generalized_dice and self_adjusting_dice have next to no gradient at the start of slots, and later a share of
  less than a third. Their direction is then another one, and more of their pull is on easy tokens than that of
  cross_entropy, not less.

So on slots the part of the supposition about easy tokens is not borne out. Perhaps what cross-entropy learns first is
how frequent each tag is, most of all that most words have none, and a loss that counts rare tags more, or the worst
tokens of each sentence, learns less of that. In the screen topk_cross_entropy at the start alone had 49.4 %, later
alone 45.9, throughout 55.0 and cross_entropy 41.6, one seed each on validation rows. All this would fit, and is not a
proof.

From a model of other intents the first steps fit, too: it knows already that most words have no tag, more than half of
the tokens are easy, 96 % of the pull of cross_entropy is on the hard ones, and topk_cross_entropy,
weighted_cross_entropy and sparsemax have its direction (cosines of 0.88 and more). But by a tenth of the training they
have left it (0.52 to 0.61), spherical_z has another one from the start (0.25), and none of them gains: so another
direction alone is not enough.

On intents an answer is a name and its end, which is known soon. The cross-entropy
[of the name alone](#long-tailed-intents-from-scratch-the-name-alone) gains 8.2 points: so most of what is gained there
may be that the end counts less, and one can have that without another loss. weighted_cross_entropy has 2.2 ± 0.6 points
more than that. At what time of the training the end has to count less these runs do not show: the name alone that
fades out over the first 30 % of the steps, and the name alone that fades in over them and stays, have 2 to 3 points
each, neither decided.

Here p is the model's probability of the right token, easy is p > 0.9 and hard p < 0.5. The pull of a loss on a token
is the norm of its gradient in the token's hidden state, and is summed. The last two tables of each task are of the
gradient in all weights; a share is 0.4 n / (0.6 + 0.4 n), where n is its norm beside that of cross_entropy.
"""

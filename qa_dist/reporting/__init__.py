"""What a person looks at before and after training.

How sure scores and their differences are (`qa-dist analyze`):
    `analysis`: all that is found out, as plain data: intervals, slices, mistakes, differences, scatter over seeds.
    `questions`: what was asked, with its references and contexts.
    `systems`: what was answered: files of predictions, or folders of runs with their options.
    `intervals`: how far scores would scatter, by drawing contexts anew; p-values of differences.
    `slices`: questions sorted by what may make them hard: lengths, question words, overlap.
    `mistakes`: wrong answers sorted by what is wrong with them.
    `sentences`: where sentences begin and end.
    `calibration`: whether files of answers are right as often as they say.
    `tables`: all of it written for a terminal.
    `flags`: flags that several commands about scores have.

A data set and its examples (`qa-dist inspect`):
    `data_set`: counts, lengths in tokens, and what any model could reach.
    `suggestions`: what other lengths and strides of windows would cost and allow.
    `data_set_lines`: a data set for a terminal.
    `data_set_page`: a data set as a page.
    `examples`: one example, its windows and every token of them, as plain values.
    `example_logits`: what a model says of each of these tokens, and its answers.
    `example_lines`: an example for a terminal.
    `inspection`: an example as a value for Python.
    `columns`: text in columns of a terminal, with what a terminal would obey made visible.

A page about runs (`qa-dist report`):
    `report_file`: the page in one call: folders in, a file out.
    `run_folders`: what the folders of runs hold, whether these ended, go on or were killed.
    `report_runs`: what is said of a run itself: how far it came, its options, its machine.
    `report_scores`: what is said of its answers, on the questions that all runs answer.
    `shown_answers`: questions picked for reading, with marks in their contexts.
    `report_page`: all of that as one page.
    `pages`: HTML from templates: all text escaped, nothing loaded, written whole.
    `drawings`: charts as SVG in the page's own colours.
    `curves`: long curves as few points that look the same.

A model card, and the way to the hub (`qa-dist card`, `qa-dist publish`):
    `run_record`: what a model's folder says of itself, without paths of this machine.
    `card`: the card: the hub's metadata and the text.
    `card_text`: the sections of that text.
    `publication`: which files are published, and what is taken out of them.
    `hub`: uploads them in one commit.
    `hub_ids`: ids as the hub allows them, in flags.
"""

"""What a person looks at before and after training.

`analysis` says how sure scores and their differences are, by slice and by kind of mistake. `questions` reads what is
asked, `systems` what was answered; `intervals` resamples contexts, `slices` and `sentences` sort questions, `mistakes`
sorts answers, `calibration` looks at their probabilities, and `tables` writes all of it for a terminal.

`data_set` counts and measures what is trained on and says what can be reached on it; `examples` takes an example apart
into its tokens, of which `example_logits` has what a model says; `suggestions` weighs other lengths of windows.
`data_set_lines` and `example_lines` write for a terminal, in `columns`; `inspection` gives an example to Python.

`card` is the model card of a run, with the sections of `card_text`; `run_record` is what a model's folder says of
itself. `publication` is what of it is published, and `hub` publishes.
"""

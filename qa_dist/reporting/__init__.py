"""What a person looks at before and after training.

`analysis` says how sure scores and their differences are, by slice and by kind of mistake. `questions` reads what is
asked, `systems` what was answered; `intervals` resamples contexts, `slices` and `sentences` sort questions, `mistakes`
sorts answers, `calibration` looks at their probabilities, and `tables` writes all of it for a terminal.

`examples` takes an example apart into its tokens, which `example_lines` writes in `columns`.
"""

"""What every room may use, and nothing about questions, models or ranks.

`command` runs an entry point and turns its end into an exit code; `errors` are the exceptions and who is to act on
each; `files` writes whole files or none. `parsers` reads JSON and YAML without silent losses, `secrets` masks tokens in
text, `signals` notes that a run is asked to stop, `hosts` names machines, `shipped` finds the recipes and scripts that
travel with the package, `libraries` shortens what libraries say. `notebook` is for calls from Python.
"""

"""Arms that need code of their own, a module each; `vqlora.baselines` imports them by name when asked for.

A module has those of `configure` (the peft config), `begin` (after the model is wrapped), `callbacks`,
`ranks` and `finish` (after training) that its arm needs.
"""

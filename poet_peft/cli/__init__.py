"""The command `poet-peft`. `app` holds the commands; what each of them does is a function of the module beside it."""

"""Tasks that come with compresso, in the form of lm-eval: a YAML file each."""

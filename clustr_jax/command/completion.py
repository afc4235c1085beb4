"""clustr-jax completion bash|zsh|fish: a script that completes commands, configs and settings.

    eval "$(clustr-jax completion bash)"           # in ~/.bashrc; zsh: the same in ~/.zshrc, after compinit
    clustr-jax completion fish | source            # in ~/.config/fish/config.fish

The script knows the names of the version that printed it; completing starts no Python.
"""

import sys
from collections.abc import Collection, Sequence

from clustr_jax.command import COMMANDS
from clustr_jax.command.guesses import names

SHELLS = ("bash", "zsh", "fish")
_FLAGS = (
    "workdir=", "stages=", "platform=", "coordinator=", "num_processes=", "process_id=", "profile", "quiet",
    "list", "help",
)  # fmt: skip
# Candidates for the word under the cursor, $2, of the command $1: the same lines in bash and in zsh.
_WORDS = """\
_clustr_jax_words() {
  local configs="@CONFIGS@" methods="@METHODS@" variants="@VARIANTS@" item IFS=$' \\t\\n'
  case $1:$2 in
    train:--config=*:*,*) for item in ${=variants}; do printf '%s\\n' "${2%,*},$item"; done ;;
    train:--config=*:*) for item in ${=methods}; do printf '%s\\n' "${2%%:*}:$item"; done ;;
    train:--config=*) for item in ${=configs}; do printf '%s\\n' "--config=$item"; done ;;
    train:*) printf '%s\\n' @FLAGS@ ;;
    completion:*) printf '%s\\n' @SHELLS@ ;;
    :*) printf '%s\\n' @COMMANDS@ ;;
  esac
}
"""
_BASH = """\
_clustr_jax() {
  local line=${COMP_LINE:0:COMP_POINT} word command= tail
  local -a words
  word=${line##* }
  read -ra words <<< "${line%"$word"}"
  command=${words[1]:-}
  local IFS=$'\\n'
  COMPREPLY=($(compgen -W "$(_clustr_jax_words "$command" "$word")" -- "$word"))
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
  # readline replaces only what follows the last of its breaks
  case $COMP_WORDBREAKS in *:*) tail=${word##*[=:]} && COMPREPLY=("${COMPREPLY[@]#"${word%"$tail"}"}") ;; esac
}
complete -o default -F _clustr_jax clustr-jax
"""
_ZSH = """\
_clustr_jax() {
  local word=$PREFIX
  local -a found
  (( CURRENT > 2 )) && local command=${words[2]} || local command=
  found=("${(@f)$(_clustr_jax_words "$command" "$word")}")
  if [[ -n $found ]]; then compadd -S '' -- $found; else _files; fi
}
compdef _clustr_jax clustr-jax
"""


def script(
    shell: str,
    configs: Sequence[str],
    methods: Sequence[str],
    variants: Sequence[str],
    settings: Collection[str],
) -> str:
    """The text to be evaluated by this shell; `settings` are the paths of all, "train.epochs"."""
    flags = ["--config=", *(f"--{flag}" for flag in _FLAGS), *(f"--config.{name}=" for name in settings)]
    if shell == "fish":
        return _fish(configs, methods, variants, settings)
    text = _WORDS if shell == "zsh" else _WORDS.replace("${=", "${")
    for name, items in (
        ("CONFIGS", configs),
        ("METHODS", methods),
        ("VARIANTS", variants),
        ("FLAGS", flags),
        ("SHELLS", SHELLS),
        ("COMMANDS", [*COMMANDS, "--help"]),
    ):
        text = text.replace(f"@{name}@", " ".join(items))
    return text + (_ZSH if shell == "zsh" else _BASH)


def _fish(configs, methods, variants, settings):
    first = "complete -c clustr-jax -n __fish_use_subcommand -f"
    lines = [f"{first} -a {name} -d '{text}'" for name, (_, text) in COMMANDS.items()]
    train = "complete -c clustr-jax -n '__fish_seen_subcommand_from train'"
    for name in configs:
        specs = [name, *(f"{name}:{method}" for method in methods)]
        lines.append(f"{train} -l config -x -a '{' '.join(specs)}'")
    for variant in variants:
        specs = [f"{name}:{method},{variant}" for name in configs for method in methods]
        lines.append(f"{train} -l config -x -a '{' '.join(specs)}'")
    lines += [f"{train} -l {flag.rstrip('=')}{' -r' * flag.endswith('=')}" for flag in _FLAGS]
    lines += [f"{train} -l config.{name} -x" for name in settings]
    lines.append(
        f"complete -c clustr-jax -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'"
    )
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Prints the script; exit code 2 for a shell that is not known."""
    how = 'in ~/.bashrc: eval "$(clustr-jax completion bash)"'
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: clustr-jax completion {{{','.join(SHELLS)}}}; {how}")
        return 0
    if len(argv) != 1 or argv[0] not in SHELLS:
        told = f"expected one of {', '.join(SHELLS)}, got {' '.join(argv)[:50]!r}"
        print(f"error: {told}; {how}", file=sys.stderr)
        return 2
    from clustr_jax.command import train

    train._find_configs()
    from configs.common import METHODS, VARIANTS, base

    found = sorted(p.stem for p in train.configs().glob("*.py") if p.stem not in ("__init__", "common"))
    print(script(argv[0], found, list(METHODS), list(VARIANTS), list(names(base("digits")))), end="")
    return 0


#compdef medmamba

_medmamba_completion() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _MEDMAMBA_COMPLETE=complete_zsh medmamba)
}

compdef _medmamba_completion medmamba


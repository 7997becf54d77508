"""`dfc lsp`: the language server that editors talk to."""

from __future__ import annotations

from dfc.errors import DfcError


def lsp() -> None:
    """Help editors with .dfc files, as a language server.

    Speaks the Language Server Protocol on stdin and stdout: errors as you type, completion,
    meaning of words, go to definition, outline, formatting. It reads .dfc text only and never
    imports your code. Needs: pip install 'dfc-compiler[lsp]'

    \b
    Neovim (0.11 or later):
      vim.filetype.add({ extension = { dfc = "dfc" } })
      vim.lsp.config("dfc", { cmd = { "dfc", "lsp" }, filetypes = { "dfc" } })
      vim.lsp.enable("dfc")

    \b
    Helix, in languages.toml:
      [language-server.dfc]
      command = "dfc"
      args = ["lsp"]
      [[language]]
      name = "dfc"
      scope = "source.dfc"
      file-types = ["dfc"]
      comment-token = "#"
      language-servers = ["dfc"]

    \b
    Emacs (eglot):
      (define-derived-mode dfc-mode prog-mode "dfc")
      (add-to-list 'auto-mode-alist '("\\\\.dfc\\\\'" . dfc-mode))
      (with-eval-after-load 'eglot
        (add-to-list 'eglot-server-programs '(dfc-mode . ("dfc" "lsp"))))

    \b
    VS Code: the extension in editors/vscode starts it; see editors/README.md.

    \b
    Examples:
      dfc lsp
    """
    import importlib.util
    import os
    import sys

    if importlib.util.find_spec("pygls") is None or importlib.util.find_spec("lsprotocol") is None:
        raise DfcError(
            "K002", "the language server needs pygls, which is not installed",
            help="pip install 'dfc-compiler[lsp]'", status=7,
        )  # fmt: skip
    from dfc.lsp.server import serve

    # The protocol has stdout to itself: what else prints goes to stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # a thread that is still loading a library must not hold up the editor

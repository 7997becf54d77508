// Starts `dfc lsp` for .dfc files. All that an editor shows comes from there; see dfc/lsp.
const { workspace } = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

exports.activate = function () {
  const [command, ...args] = workspace.getConfiguration("dfc").get("command");
  const server = { command, args };
  const options = { documentSelector: [{ language: "dfc" }] };
  client = new LanguageClient("dfc", "dfc", server, options);
  return client.start();
};

exports.deactivate = function () {
  return client ? client.stop() : undefined;
};

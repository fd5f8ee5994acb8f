// The build: writes dist/ from src/, with the page compiled into a module.
// Only what Node.js brings: nothing to fetch.
import { copyFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";

rmSync("dist", { recursive: true, force: true });
mkdirSync("dist");
copyFileSync("src/server.mjs", "dist/server.mjs");
copyFileSync("src/main.mjs", "dist/main.mjs");

const page = readFileSync("src/page.html", "utf8");
for (const name of ["greeting", "node", "commit"]) {
  if (!page.includes(`{{${name}}}`)) {
    throw new Error(`src/page.html does not use {{${name}}}`);
  }
}
writeFileSync("dist/page.mjs", `export default ${JSON.stringify(page)};\n`);
console.log("built dist/");

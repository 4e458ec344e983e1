// Validates the Istio resources on standard input, [{name, document}], by the schemas of @kubernetes-models/istio,
// and prints a line for each that is refused. Run by validate.py.
import { readFileSync } from "node:fs";

for (const { name, document } of JSON.parse(readFileSync(0, "utf8"))) {
  const { apiVersion, kind } = document;
  try {
    const models = await import(`@kubernetes-models/istio/${apiVersion}/${kind}`);
    new models[kind](document).validate();
  } catch (error) {
    console.log(`${name}: ${kind}: ${error.message.split("\n").join("; ")}`);
  }
}

// What llama.cpp makes of a GGUF file, for compare_llama_cpp.py, which runs this where node-llama-cpp is installed.
// Standard input: {"prompt": [id, ...], "windows": [[id, ...], ...], "texts": [text, ...]}. Standard output: {"greedy": the 32
// ids that follow the prompt, "loss": the mean loss of the windows' ids after the first, "ids": of the texts}.
import {readFileSync} from "node:fs";
const {getLlama, LlamaLogLevel} = await import(new URL("node_modules/node-llama-cpp/dist/index.js", `file://${process.cwd()}/`));

const {prompt, windows, texts} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({build: "never", gpu: false, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: process.argv[2]});
const room = 8;     // without it, node-llama-cpp drops the first tokens before it evaluates the last
const contextSize = Math.max(prompt.length + 32, ...windows.map((ids) => ids.length)) + room;
const context = await model.createContext({contextSize, batchSize: contextSize});
const sequence = context.getSequence();

const greedy = [];
for await (const id of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true}))
    if (greedy.push(id) === 32)
        break;

const losses = [];
for (const ids of windows) {
    await sequence.clearHistory();
    const outputs = await sequence.controlledEvaluate(ids.slice(0, -1).map((id) => [id, {generateNext: {probabilities: true}}]));
    outputs.forEach(({next}, i) => losses.push(-Math.log(next.probabilities.get(ids[i + 1]))));
}
const loss = losses.reduce((sum, value) => sum + value) / losses.length;
console.log(JSON.stringify({greedy, loss, ids: texts.map((text) => model.tokenize(text, true))}));
process.exit(0);

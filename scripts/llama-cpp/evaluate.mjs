// Evaluates texts in llama.cpp.
//
//     node evaluate.mjs < JOBS
//
// JOBS is a JSON list of {"model": FILE, "adapters": [{"filePath": FILE, "scale": S}], "texts":
// [TEXT]}. For each job and text, it prints a line of JSON: the token ids, the probability of each
// token after the first, and all probabilities of the token after the text, by id. Keys and values
// are cached in f32.
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const text = await new Promise((resolve) => {
    let all = "";
    process.stdin.on("data", (part) => (all += part));
    process.stdin.on("end", () => resolve(all));
});
const llama = await getLlama({
    gpu: false, build: "never", progressLogs: false, logLevel: LlamaLogLevel.warn, maxThreads: Number(process.env.OMP_NUM_THREADS ?? 2),
});
for (const {model: modelPath, adapters = [], texts} of JSON.parse(text)) {
    const model = await llama.loadModel({modelPath, gpuLayers: 0});
    const context = await model.createContext({
        contextSize: 256,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32",
        ...(adapters.length > 0 ? {lora: {adapters}} : {}),
    });
    const sequence = context.getSequence();
    const start = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    for (const text of texts) {
        const ids = [...start, ...model.tokenize(text, true)];
        await sequence.clearHistory();
        const wants = {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}};
        const found = await sequence.controlledEvaluate(ids.map((id) => [id, wants]));
        const probabilities = found.map(({next}) => next.probabilities);
        const ofText = ids.slice(1).map((id, at) => probabilities[at].get(id) ?? 0);
        const next = new Array(model.fileInfo.metadata.tokenizer.ggml.tokens.length).fill(0);
        for (const [id, probability] of probabilities.at(-1)) next[id] = probability;
        console.log(JSON.stringify({ids, probabilities: ofText, next}));
    }
    await context.dispose();
    await model.dispose();
}
process.exit(0);

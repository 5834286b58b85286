// What load.test.ts runs in worker threads and child processes: a model whose file is cut while it is in use.
import { truncateSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads'
import { Llama } from '../../lib/model/llama.js'

const [mode, dir] = (isMainThread ? process.argv.slice(2) : workerData) as [string, string]

if (mode === 'signal') {
  // The only thread that loaded the addon ends, and its signal handler is still there.
  const worker = new Worker(fileURLToPath(import.meta.url), { workerData: ['page', dir] })
  await new Promise((resolve) => worker.once('exit', resolve))
  process.kill(process.pid, 'SIGBUS')
}

const said: string[] = []
const model = await Llama.load(dir, { device: 'cpu', threads: 2 })
const tokens = Array.from({ length: 32 }, (_, b) => Array.from({ length: 128 }, (_, t) => (b * 7 + t * 3) % 300))
const cut = (bytes: number): void => truncateSync(join(dir, 'model.safetensors'), bytes)
const attempt = async (what: string, work: () => Promise<unknown>): Promise<void> => {
  const result = await work().then(
    () => 'was done',
    (error: NodeJS.ErrnoException) => `${error.name} ${error.code}: ${error.message}`,
  )
  said.push(`${what}: ${result}`)
}
await attempt('logits before', () => model.logits(tokens))
if (mode === 'during') setTimeout(() => cut(0), 1)
else cut(mode === 'page' ? 4096 : 100_001)
await attempt('logits', async () => {
  // the timer may come between two runs, and the first of them then has its right result
  for (let i = 0; i < (mode === 'during' ? 100 : 1); i++) await model.logits(tokens)
})
await attempt('read', () => model.read('model.norm.weight'))
await attempt('write', async () => model.write('model.norm.weight', await model.read('model.norm.weight')))
await attempt('save', () => model.save(`${dir}-saved`))
model.dispose()
if (parentPort) parentPort.postMessage(said)
else console.log(said.join('\n'))

// What scripts/package-test.js runs in the folder where the package is installed: node child.mjs <mode> <model folder>.
import { Worker, isMainThread, parentPort, threadId } from 'node:worker_threads'

const [mode, folder] = process.argv.slice(2)
const { Llama } = await import(process.env.ROPEWALK_MODULE ?? 'ropewalk')
const tokens = (length) => [Array.from({ length }, (_, i) => (7 * i + 3) % 61)]

/** A loss with all its bits. */
async function loss() {
  const model = await Llama.load(folder)
  const value = await model.loss(tokens(64))
  model.dispose()
  return value
}

/** Gradients without end, each long enough to be interrupted; `started` is called once the first one runs. */
async function work(started) {
  const model = await Llama.load(folder)
  for (let first = true; ; first = false) {
    const step = model.gradients(tokens(1024))
    if (first) setTimeout(started, 10)
    await step
  }
}

const worker = () => new Worker(new URL(import.meta.url), { argv: [mode, folder] })
const message = (thread) =>
  new Promise((resolve, reject) => {
    thread.once('message', resolve)
    thread.once('error', reject)
  })
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

if (mode === 'loss') console.log(await loss())
else if (mode === 'workers') {
  if (isMainThread) console.log((await Promise.all([1, 2, 3, 4].map(() => message(worker())))).join('\n'))
  else parentPort.postMessage(await loss())
} else if (mode === 'terminate') {
  if (isMainThread) {
    for (let i = 0; i < 20; i++) {
      const thread = worker()
      await message(thread)
      await pause(3 * i)
      await thread.terminate()
    }
    console.log(await loss())
  } else await work(() => parentPort.postMessage(threadId))
} else if (mode === 'exit') await work(() => process.exit(7))
else throw new Error(`no mode ${mode}`)

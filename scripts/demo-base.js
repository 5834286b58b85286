// `npm run demo:base`: trains the base model of the demo from nothing into lib/demo/checkpoint, or the folder given.
import { setup } from './setup.js'

setup()
const { BASE } = await import('../dist/demo/demo.js')
const { trainBase } = await import('../dist/demo/base.js')
const folder = process.argv[2] ?? BASE
const started = performance.now()
const controller = new AbortController()
for (const name of ['SIGINT', 'SIGTERM']) process.once(name, () => controller.abort())
const onPoint = ({ tokens, learningRate, loss, context, perplexity, passkey }) => {
  const minutes = ((performance.now() - started) / 60000).toFixed(1)
  console.log(
    `${minutes} min  ${(tokens / 1e6).toFixed(2)}M tokens  lr ${learningRate.toExponential(1)}  loss ${loss.toFixed(3)}  ` +
      `at ${context}: perplexity ${perplexity.toFixed(3)}, keys found ${Math.round(100 * passkey)} %`,
  )
}
await trainBase(folder, { signal: controller.signal, onPoint })
console.log(`saved ${folder}`)

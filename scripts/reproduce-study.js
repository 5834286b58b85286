// `npm run reproduce:study`: trains models of several sizes from nothing and stretches each, with and without interpolation.
// What is finished is kept: the same command goes on where it was stopped. The folder may be given.
import { setup } from './setup.js'

setup()
const { study } = await import('../dist/reproduce/study.js')
const out = process.argv[2] ?? 'ropewalk-study'
const controller = new AbortController()
for (const name of ['SIGINT', 'SIGTERM']) process.once(name, () => controller.abort())
const started = performance.now()
let shown = ''
await study({
  out,
  signal: controller.signal,
  onProgress(done, task) {
    const line = `${Math.floor(100 * done)} % ${task.replace(/, step .*/, '')}`
    if (line === shown) return
    shown = line
    console.error(`${((performance.now() - started) / 60000).toFixed(1)} min  ${line}`)
  },
})
console.log(`the study: ${out}/index.html`)

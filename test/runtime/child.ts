// What runtime.test.ts runs in worker threads and child processes. The mode stands in workerData or on the command line.
import { isMainThread, parentPort, workerData } from 'node:worker_threads'
import { Device } from '../../lib/runtime/device.js'
import { add, fill, matmulNn } from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'

const mode = isMainThread ? process.argv[2] : (workerData as string)

const say = (message: string): void => {
  if (parentPort) parentPort.postMessage(message)
  else console.log(message)
}

const device = Device.open('cpu', { threads: 2 })

/** Seconds of work, longer than the test waits. */
function heavy() {
  const recorder = new Recorder(device, 'heavy')
  const { y: a } = fill(recorder, { y: recorder.scratch('f32', [700, 700], 'a'), value: 0.01 })
  for (let i = 0; i < 2000; i++) matmulNn(recorder, { a, b: a })
  return recorder.plan()
}

if (mode === 'run') {
  const recorder = new Recorder(device, 'sums')
  let { y: x } = fill(recorder, { y: recorder.scratch('f32', [5000], 'x'), value: 1 })
  for (let i = 0; i < 10; i++) x = add(recorder, { a: x, b: x }).y
  const plan = recorder.plan({ keep: [x] })
  for (let i = 0; i < 20; i++) await plan.run()
  const result = await device.downloadFloats(plan.located(x))
  say(result.every((value) => value === 1024) ? 'right' : 'wrong')
} else {
  const plan = heavy()
  const running = plan.run()
  running.catch(() => {})
  setTimeout(() => {
    say('running')
    if (mode === 'exit') process.exit(7)
    if (mode === 'throw') throw new Error('thrown while a plan runs')
  }, 30)
  await running
}

// Runs every op of the table a few times on a device, for tools that watch what kernels do (compute-sanitizer):
// `every-op.js <device> [op...]`. Whole tiles and odd sizes, tensors at odd offsets too, and each
// plan twice, so that it is also replayed.
import { Device } from '../../lib/runtime/device.js'
import { everyCase, ODD_SIZES, WHOLE } from '../ops/every.js'

const [name = 'cuda', ...chosen] = process.argv.slice(2)
const device = Device.open(name)
const total = { passed: 0, failed: 0 }
for (const { label, run } of everyCase(chosen, [WHOLE, ODD_SIZES])) {
  try {
    await run(device, 2)
    total.passed++
  } catch (error) {
    total.failed++
    console.log(`not ok: ${label}: ${(error as Error).message}`)
  }
}
device.dispose()
console.log(`${total.passed} passed, ${total.failed} failed, 0 skipped`)
if (total.failed > 0) process.exitCode = 1

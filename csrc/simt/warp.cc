#include "warp.h"

#include "async.h"
#include "fiber.h"

namespace simt {

void exchange(void* const* slots, uint32_t mask) {
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask & (1u << lane))) continue;
    auto* own = static_cast<Exchange*>(slots[lane]);
    if (own->source < 0 || own->source > 31 || !(mask & (1u << own->source)))
      fail("a shuffle takes the value of lane %d, which is not in mask %08x", own->source, mask);
    own->result = static_cast<Exchange*>(slots[own->source])->value;
  }
}

namespace {

constexpr uint32_t kAll = 0xffffffffu;

struct Vote {
  int predicate;
  uint32_t ballot;
};

void vote(void* const* slots, uint32_t mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask & (1u << lane) && static_cast<Vote*>(slots[lane])->predicate) ballot |= 1u << lane;
  for (int lane = 0; lane < 32; lane++)
    if (mask & (1u << lane)) static_cast<Vote*>(slots[lane])->ballot = ballot;
}

uint32_t ballot_of(uint32_t mask, const char* what, int predicate) {
  Vote own = {predicate, 0};
  collective(mask, what, &own, vote);
  return own.ballot;
}

struct Matrices {
  uint32_t* r;
  int count;
  const void* row;
  bool transposed;
};

void load_matrices(void* const* slots, uint32_t) {
  const auto* first = static_cast<Matrices*>(slots[0]);
  for (int m = 0; m < first->count; m++) {
    uint16_t x[8][8];
    for (int row = 0; row < 8; row++) memcpy(x[row], static_cast<Matrices*>(slots[8 * m + row])->row, 16);
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      const auto* own = static_cast<Matrices*>(slots[lane]);
      const uint32_t low = own->transposed ? x[2 * t][g] : x[g][2 * t];
      const uint32_t high = own->transposed ? x[2 * t + 1][g] : x[g][2 * t + 1];
      own->r[m] = low | high << 16;
    }
  }
}

float low_half(uint32_t x) { return __uint_as_float(x << 16); }
float high_half(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

void multiply(void* const* slots, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    const auto* own = static_cast<Product*>(slots[lane]);
    for (int i = 0; i < 4; i++) {
      const int row = g + 8 * (i % 2), column = 2 * t + 8 * (i / 2);
      a[row][column] = low_half(own->a[i]);
      a[row][column + 1] = high_half(own->a[i]);
    }
    b[2 * t][g] = low_half(own->b0);
    b[2 * t + 1][g] = high_half(own->b0);
    b[2 * t + 8][g] = low_half(own->b1);
    b[2 * t + 9][g] = high_half(own->b1);
  }
  float d[16][8] = {};
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    float* own = static_cast<Product*>(slots[lane])->d;
    own[0] += d[g][2 * t];
    own[1] += d[g][2 * t + 1];
    own[2] += d[g + 8][2 * t];
    own[3] += d[g + 8][2 * t + 1];
  }
}

struct Movement {
  uint32_t x, y;
};

void move_matrix(void* const* slots, uint32_t) {
  uint16_t x[8][8];
  for (int lane = 0; lane < 32; lane++) memcpy(&x[lane / 4][2 * (lane % 4)], &static_cast<Movement*>(slots[lane])->x, 4);
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    static_cast<Movement*>(slots[lane])->y = x[2 * t][g] | static_cast<uint32_t>(x[2 * t + 1][g]) << 16;
  }
}

void nothing(void* const*, uint32_t) {}

}  // namespace

void ldmatrix(uint32_t* r, int count, const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: the row's address %p is not 16-byte aligned", row);
  Matrices own = {r, count, row, transposed};
  collective(kAll, transposed ? "ldmatrix.trans" : "ldmatrix", &own, load_matrices);
}

void mma_16x8x16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  Product own = {d, a, b0, b1};
  collective(kAll, "mma", &own, multiply);
}

uint32_t movmatrix_trans(uint32_t x) {
  Movement own = {x, 0};
  collective(kAll, "movmatrix", &own, move_matrix);
  return own.y;
}

void cp_async(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async: %p to %p is not aligned to %d bytes", from, to, bytes);
  memset(to, 0xff, static_cast<size_t>(bytes));
  self->copies.push_back({to, from, bytes, valid, self->group});
}

void cp_async_commit() { self->group++; }

void cp_async_wait(int groups) {
  auto& copies = self->copies;
  size_t kept = 0;
  for (const PendingCopy& copy : copies) {
    if (copy.group >= self->group - groups) {
      copies[kept++] = copy;
      continue;
    }
    memcpy(copy.to, copy.from, static_cast<size_t>(copy.valid));
    memset(static_cast<char*>(copy.to) + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
  }
  copies.resize(kept);
}

}  // namespace simt

uint32_t __ballot_sync(uint32_t mask, int predicate) { return simt::ballot_of(mask, "__ballot_sync", predicate); }
int __any_sync(uint32_t mask, int predicate) { return simt::ballot_of(mask, "__any_sync", predicate) != 0; }
int __all_sync(uint32_t mask, int predicate) { return simt::ballot_of(mask, "__all_sync", predicate) == mask; }
void __syncwarp(uint32_t mask) {
  int own = 0;
  simt::collective(mask, "__syncwarp", &own, simt::nothing);
}

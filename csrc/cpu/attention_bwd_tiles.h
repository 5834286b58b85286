// The block of attention_bwd.cc with products by AMX (tiles.h): 128 queries by 384 keys, 32 keys at a time.
//
// s = q k^T and dp = dout v^T come in rows of queries with the keys in the lanes. Weights p and slopes ds go from
// registers into packed form: pair by pair of queries for dv^T += dout^T p and dk^T += q^T ds, and row by row for dq +=
// ds k, which is added up over all keys of the block. Keys and values are packed once for all queries of a chunk,
// queries and dout for 384 keys. Pieces as in attention_tiles.h: three in f32; with bf16, whose rows are exact, two of
// p and ds.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace rw::cpu::RW_ISA {

#ifdef RW_HAS_TILES

template <typename F>
struct BackwardTiles {
  static constexpr int64_t keys_most = 384, rows_most = 128;
  static constexpr int64_t key_panels = keys_most / PANEL, row_panels = rows_most / PANEL;
  static constexpr int of_rows = sizeof(F) == sizeof(float) ? 3 : 1;  // pieces of q, k, v, dout
  static constexpr int of_slopes = sizeof(F) == sizeof(float) ? 3 : 2;

  const attention_bwd_args& a;
  int64_t D = a.q.dims[3];
  float scale = static_cast<float>(a.scale);
  int64_t steps = round_up(D, STEP) / STEP;           // along D; also its panels
  int64_t row_panel = steps * of_rows * PIECE;        // 32 rows, D along k
  int64_t keys_panel = key_panels * of_rows * PIECE;  // 32 of D, keys along k
  int64_t rows_panel = row_panels * of_rows * PIECE;  // 32 of D, queries along k
  int64_t slopes_panel = key_panels * of_slopes * PIECE;

  uint16_t *k = nullptr, *v = nullptr, *k_across = nullptr;  // b: columns keys, keys, D
  uint16_t *q = nullptr, *dout = nullptr;                    // a: rows queries
  uint16_t *q_across = nullptr, *dout_across = nullptr;      // a: rows D
  uint16_t *p_packed = nullptr, *ds_packed = nullptr;        // b: columns keys
  uint16_t* ds_rows = nullptr;                               // a: rows queries
  float *p = nullptr, *ds = nullptr, *dq = nullptr;          // (rows_most, PANEL) twice, (PANEL, PANEL)
  float *dkt = nullptr, *dvt = nullptr;                      // (D, keys_most)
  float *values = nullptr, *odd_k = nullptr, *odd_q = nullptr, *odd_dout = nullptr;
  float *lse = nullptr, *delta = nullptr;
  int32_t* first = nullptr;

  // Takes the parts of scratch memory from an address on; returns the end.
  uintptr_t lay_out(uintptr_t at) {
    const auto floats = [&](int64_t n) {
      float* part = reinterpret_cast<float*>(at);
      at += static_cast<uintptr_t>(round_up(n, 16)) * sizeof(float);
      return part;
    };
    const auto pieces = [&](int64_t n) { return reinterpret_cast<uint16_t*>(floats(n / 2)); };
    k = pieces(key_panels * row_panel);
    v = pieces(key_panels * row_panel);
    k_across = pieces(steps * keys_panel);
    q = pieces(row_panels * row_panel);
    dout = pieces(row_panels * row_panel);
    q_across = pieces(steps * rows_panel);
    dout_across = pieces(steps * rows_panel);
    p_packed = pieces(row_panels * of_slopes * PIECE);
    ds_packed = pieces(row_panels * of_slopes * PIECE);
    ds_rows = pieces(row_panels * slopes_panel);
    p = floats(rows_most * PANEL);
    ds = floats(rows_most * PANEL);
    dq = floats(PANEL * PANEL);
    dkt = floats(steps * STEP * keys_most);
    dvt = floats(steps * STEP * keys_most);
    values = floats(keys_most * D);
    odd_k = floats(keys_most * D);
    odd_q = floats(rows_most * D);
    odd_dout = floats(rows_most * D);
    lse = floats(rows_most);
    delta = floats(rows_most);
    first = reinterpret_cast<int32_t*>(floats(rows_most));
    return at;
  }
  static size_t scratch(const attention_bwd_args& a) {
    BackwardTiles x{a};
    return x.lay_out(0);
  }

  // Packs rows across (D as lines, rows along k). What is odd goes to `odd` and counts as 0; returns whether anything
  // is.
  template <bool of_b>
  bool pack_across(const F* from, int64_t ld, int64_t rows, uint16_t* to, int64_t panel, float* odd) const {
    if (!any_odd(from, ld, rows, D)) {
      pack_panels<of_rows, of_b>(from, 1, ld, D, rows, to, panel);
      return false;
    }
    load_rows(values, D, from, ld, rows, D);
    take_odd(values, odd, rows * D);
    pack_panels<of_rows, of_b>(values, 1, D, D, rows, to, panel);
    return true;
  }

  // p and ds of rows [low, high) for the 32 keys from n0 on, from s and dp in their place: packed, and where `keep` in
  // place.
  template <bool masked>
  void slopes(int64_t low, int64_t high, int64_t rows, int64_t t0, int64_t n0, int64_t strip_number, bool keep) const {
    const vf factor = broadcast(scale * log2_e);
    vi key[2];
    for (int j = 0; j < 2; j++)
      for (int i = 0; i < VL; i++) key[j][i] = static_cast<int32_t>(n0 + j * VL + i);
    for (int64_t r = low; r < high; r += 2) {
      vf weight[2][2], slope[2][2];
      for (int i = 0; i < 2; i++) {
        const vf row_lse = broadcast(lse[r + i]), row_delta = broadcast(delta[r + i]);
        for (int j = 0; j < 2; j++) {
          float *at_p = p + (r + i) * PANEL + j * VL, *at_ds = ds + (r + i) * PANEL + j * VL;
          weight[i][j] = exp2(load(at_p) * factor - row_lse);
          slope[i][j] = weight[i][j] * (load(at_ds) - row_delta) * scale;
          if (masked) {
            const int32_t last = r + i < rows ? static_cast<int32_t>(t0 + r + i) : -1;
            const vi seen = (key[j] >= first[r + i]) & (key[j] <= last);
            weight[i][j] = seen ? weight[i][j] : vf{};
            slope[i][j] = seen ? slope[i][j] : vf{};
          }
          if (keep) {
            store(at_p, weight[i][j]);
            store(at_ds, slope[i][j]);
          }
        }
      }
      uint16_t* to_p = p_packed + r / STEP * of_slopes * PIECE + r % STEP / 2 * STEP;
      uint16_t* to_ds = ds_packed + r / STEP * of_slopes * PIECE + r % STEP / 2 * STEP;
      uint16_t* to_rows = ds_rows + r / PANEL * slopes_panel + strip_number * of_slopes * PIECE +
                          r % PANEL / TILE * TILE_SIZE + r % TILE * STEP;
      for (int piece = 0; piece < of_slopes; piece++, to_p += PIECE, to_ds += PIECE, to_rows += PIECE) {
        vu x[2][2];
        for (int j = 0; j < 2; j++) {
          const vu packed = pairs(take_piece(weight[0][j]), take_piece(weight[1][j]));
          memcpy(to_p + j * TILE_SIZE, &packed, sizeof(packed));
          for (int i = 0; i < 2; i++) x[i][j] = take_piece(slope[i][j]);
          const vu slopes_packed = pairs(x[0][j], x[1][j]);
          memcpy(to_ds + j * TILE_SIZE, &slopes_packed, sizeof(slopes_packed));
        }
        for (int i = 0; i < 2; i++) {
          const vu row = joined(x[i][0], x[i][1]);
          memcpy(to_rows + i * STEP, &row, sizeof(row));
        }
      }
    }
  }

  // Queries t0 .. t0 + rows of head h against the keys n0 .. n0 + keys that are packed.
  void block(int64_t b, int64_t h, int64_t n0, int64_t keys, bool k_odd, int64_t t0, int64_t rows, float* dq_sum,
             int64_t dq_stride) const {
    const int64_t T = a.q.dims[1], H = a.q.dims[2], rotated = a.qr.dims[2];
    const int32_t* from = a.first.as<int32_t>() + b * T + t0;
    int64_t begin = -1, end = 0, first_max = 0;
    for (int64_t r = 0; r < rows; r++) {
      if (t0 + r >= n0 && from[r] < n0 + keys) {
        if (begin < 0) begin = r;
        end = r + 1;
      }
      lse[r] = a.lse.as<float>()[(b * H + h) * T + t0 + r] * log2_e;
      delta[r] = a.delta.as<float>()[(b * H + h) * T + t0 + r];
      first[r] = from[r];
      first_max = max_of(first_max, from[r]);
    }
    if (begin < 0) return;
    for (int64_t r = rows; r < round_up(rows, PANEL); r++) lse[r] = delta[r] = 0, first[r] = 0;
    const F* qr = a.qr.as<F>() + ((b * T + t0) * rotated + h % rotated) * D;
    const F* gradient = a.dout.as<F>() + ((b * T + t0) * H + h) * D;
    pack_panels<of_rows, false>(qr, rotated * D, 1, rows, D, q, row_panel);
    pack_panels<of_rows, false>(gradient, H * D, 1, rows, D, dout, row_panel);
    const bool q_odd = pack_across<false>(qr, rotated * D, rows, q_across, rows_panel, odd_q);
    const bool dout_odd = pack_across<false>(gradient, H * D, rows, dout_across, rows_panel, odd_dout);
    const bool keep = k_odd || q_odd || dout_odd;

    const int64_t high = round_up(end, PANEL);
    int64_t strips[row_panels] = {};  // of each panel of rows, how many there are
    for (int64_t c = 0; c * PANEL < keys; c++) {
      const int64_t lane0 = n0 + c * PANEL, low = max_of(begin, lane0 - t0) / PANEL * PANEL;
      if (low >= high) break;
      for (int64_t r = low; r < high; r += PANEL) {
        const uint16_t *rows_q = q + r / PANEL * row_panel, *rows_dout = dout + r / PANEL * row_panel;
        tile_product<of_rows, of_rows>(steps, rows_q, k + c * row_panel, nullptr, 0, p + r * PANEL, PANEL);
        tile_product<of_rows, of_rows>(steps, rows_dout, v + c * row_panel, nullptr, 0, ds + r * PANEL, PANEL);
        strips[r / PANEL] = c + 1;
      }
      if (t0 + low < lane0 + PANEL - 1 || first_max > lane0 || high > rows)
        slopes<true>(low, high, rows, t0, lane0, c, keep);
      else
        slopes<false>(low, high, rows, t0, lane0, c, keep);
      const int64_t count = (high - low) / STEP, step = low / STEP;
      for (int64_t d = 0; d < steps; d++) {
        float *to_v = dvt + d * STEP * keys_most + c * PANEL, *to_k = dkt + d * STEP * keys_most + c * PANEL;
        const int64_t across = d * rows_panel + step * of_rows * PIECE, packed = step * of_slopes * PIECE;
        tile_product<of_rows, of_slopes>(count, dout_across + across, p_packed + packed, to_v, keys_most, to_v,
                                         keys_most);
        tile_product<of_rows, of_slopes>(count, q_across + across, ds_packed + packed, to_k, keys_most, to_k,
                                         keys_most);
      }
      if (!keep) continue;
      // what the unit left out
      const int64_t live = min_of(PANEL, keys - c * PANEL), last = min_of(high, rows);
      const float *p_low = p + low * PANEL, *ds_low = ds + low * PANEL;
      if (dout_odd)
        multiply_selected<true, false>(odd_dout + low * D, D, p_low, PANEL, last - low, dvt + c * PANEL, keys_most, D,
                                       live);
      if (q_odd)
        multiply_selected<true, false>(odd_q + low * D, D, ds_low, PANEL, last - low, dkt + c * PANEL, keys_most, D,
                                       live);
      if (k_odd)
        multiply_selected<false, true>(ds_low, PANEL, odd_k + c * PANEL * D, D, live, dq_sum + low * dq_stride,
                                       dq_stride, last - low, D);
    }
    for (int64_t r = 0; r < rows; r += PANEL) {
      if (strips[r / PANEL] == 0) continue;
      for (int64_t d = 0; d < steps; d++) {
        tile_product<of_slopes, of_rows>(strips[r / PANEL], ds_rows + r / PANEL * slopes_panel,
                                         k_across + d * keys_panel, nullptr, 0, dq, PANEL);
        const int64_t columns = min_of(STEP, D - d * STEP);
        for (int64_t i = 0; i < PANEL && r + i < rows; i++)
          for (int64_t x = 0; x < columns; x++) dq_sum[(r + i) * dq_stride + d * STEP + x] += dq[i * PANEL + x];
      }
    }
  }

  // The queries of a chunk against the keys of a chunk; dk and dv begin at zero where `fresh`.
  template <typename Sums>
  void run(float* scratch, const Sums& sums, int64_t b, int64_t head, int64_t q_begin, int64_t q_end, int64_t k_begin,
           int64_t k_end, bool fresh) {
    lay_out(reinterpret_cast<uintptr_t>(scratch));
    const int64_t T = a.q.dims[1], H = a.q.dims[2], K = a.k.dims[2], G = H / K, rotated = a.kr.dims[2];
    const F *kr = a.kr.as<F>() + (b * rotated + head % rotated) * T * D,
            *values_of = a.v.as<F>() + (b * T * K + head) * D;
    take_tiles();
    for (int64_t n0 = k_begin; n0 < k_end; n0 += keys_most) {
      const int64_t keys = min_of(keys_most, k_end - n0);
      pack_panels<of_rows, true>(kr + n0 * D, D, 1, keys, D, k, row_panel);
      pack_panels<of_rows, true>(values_of + n0 * K * D, K * D, 1, keys, D, v, row_panel);
      const bool k_odd = pack_across<true>(kr + n0 * D, D, keys, k_across, keys_panel, odd_k);
      memset(dkt, 0, sizeof(float) * steps * STEP * keys_most);
      memset(dvt, 0, sizeof(float) * steps * STEP * keys_most);
      if (!fresh) {
        transpose(dkt, keys_most, sums.dk + n0 * sums.k_stride, sums.k_stride, keys, D);
        transpose(dvt, keys_most, sums.dv + n0 * sums.k_stride, sums.k_stride, keys, D);
      }
      for (int64_t g = 0; g < G; g++)
        for (int64_t t0 = q_begin; t0 < q_end; t0 += rows_most) {
          const int64_t rows = min_of(rows_most, q_end - t0);
          if (t0 + rows > n0)
            block(b, head * G + g, n0, keys, k_odd, t0, rows, sums.dq + t0 * sums.q_stride + g * D, sums.q_stride);
        }
      transpose(sums.dk + n0 * sums.k_stride, sums.k_stride, dkt, keys_most, D, keys);
      transpose(sums.dv + n0 * sums.k_stride, sums.k_stride, dvt, keys_most, D, keys);
    }
    release_tiles();
  }
};

#endif

}  // namespace rw::cpu::RW_ISA
